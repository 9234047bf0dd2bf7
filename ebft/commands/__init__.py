"""The commands of the command line, a file each: their options, their help, and one call into the library."""
