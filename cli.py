"""`python cli.py ...` in a checkout runs the same app as `ebft` and `python -m ebft`."""

from ebft.cli import main

if __name__ == "__main__":
    main()
