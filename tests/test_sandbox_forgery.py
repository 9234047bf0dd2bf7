"""Programs that try to pass tests which they fail, by Python alone; and honest ones that do what those do."""

from __future__ import annotations

import textwrap

import pytest

from ebft import sandbox
from tests.sandboxed import WRONG, isolation, run

__all__ = ["isolation"]

# From a frame or another object to everything that names lead to. A token on the way is sent as the verdict.
HUNT = r"""
import functools, gc, os, re, signal, sys, threading, time, types
me, seen = threading.get_ident(), set()
def vote(text, how):
    print("found by", how, flush=True)
    for number in range(3, 20):
        try: os.write(number, text)
        except OSError: pass
    os._exit(0)
def hunt(start, how):
    todo, count = [start], 0
    while todo and count < 30_000:
        item = todo.pop()
        count += 1
        if isinstance(item, (str, bytes)):
            text = item.encode(errors="ignore") if isinstance(item, str) else item
            if re.fullmatch(b"[0-9a-f]{32}", text): vote(text, how)
            continue
        if id(item) in seen or isinstance(item, (int, float, types.BuiltinFunctionType, type(re))): continue
        if not isinstance(item, types.FrameType): seen.add(id(item))
        if isinstance(item, types.FrameType):
            todo += [item.f_back, dict(item.f_locals), item.f_code, dict(item.f_globals)]
        elif isinstance(item, dict): todo += [*item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)): todo += [*item]
        elif isinstance(item, types.FunctionType):
            todo += [item.__code__, item.__defaults__, item.__kwdefaults__]
            todo += [cell.cell_contents for cell in item.__closure__ or ()]
        elif isinstance(item, functools.partial): todo += [item.func, item.args, item.keywords]
        elif isinstance(item, types.CodeType): todo += [item.co_consts]
        elif isinstance(item, types.GeneratorType): todo += [item.gi_frame]
        elif isinstance(item, types.TracebackType): todo += [item.tb_frame, item.tb_next]
        elif hasattr(item, "__reduce__") and type(item).__name__.endswith("iterator"): todo += [item.__reduce__()]
def attempt(action):
    try: action()
    except (Exception, SystemExit) as error: hunt(error.__traceback__, action.__name__ + "'s traceback")
"""

WAYS = r"""
def frames(): hunt(sys._getframe(), "_getframe")
def traceback(): 1 / 0
def a_generator():
    def generate(): yield hunt(generator.gi_frame, "gi_frame")
    generator = generate(); next(generator)
def a_coroutine():
    async def wait(): hunt(coroutine.cr_frame, "cr_frame")
    coroutine = wait(); coroutine.send(None)
def inspected():
    import inspect
    hunt([item.frame for item in inspect.stack()], "inspect")
def all_frames(): hunt(sys._current_frames(), "_current_frames")
def all_exceptions(): hunt(sys._current_exceptions(), "_current_exceptions")
def all_objects():
    for item in gc.get_objects(): hunt(item, "get_objects")
def referents():
    frame = sys._getframe()
    while frame:
        for item in gc.get_referents(frame):
            hunt(item, "get_referents"); hunt(gc.get_referents(item), "get_referents")
        frame = frame.f_back
def referrers(): hunt(gc.get_referrers(sys.modules), "get_referrers")
def traced(): sys.settrace(lambda *found: hunt(found, "settrace"))
def profiled(): sys.setprofile(lambda *found: hunt(found, "setprofile"))
def audited(): sys.addaudithook(lambda *found: hunt(sys._getframe(), "addaudithook"))
def collected(): gc.callbacks.append(lambda *_: hunt(sys._getframe(), "gc.callbacks"))
def finders():
    class Finder:
        def find_spec(self, *_): hunt(sys._getframe(), "meta_path")
    sys.meta_path.insert(0, Finder())
def modules(): hunt([dict(vars(module)) for module in sys.modules.values() if hasattr(module, "__dict__")], "modules")
def classes():
    for kind in type.__subclasses__(type) + object.__subclasses__(): hunt(dict(vars(kind)), "__subclasses__")
def standard_input():
    for source in (sys.stdin, sys.stdin.buffer):
        for move in ((0, 0), (-4096, 1), (0, 2)):
            try: source.seek(*move); text = source.read()
            except (OSError, ValueError): continue
            hunt(re.split(b"[^0-9a-f]", text if isinstance(text, bytes) else text.encode()), "stdin")
def descriptors():
    for number in range(60):
        try: os.lseek(number, 0, 0); text = os.read(number, 1 << 20)
        except OSError: continue
        hunt(re.split(b"[^0-9a-f]", text), "descriptors")
def processes_files():
    for name in ("environ", "cmdline", "fd/0", "fd/3", "fd/4"):
        for process in ("self", "1", str(os.getppid())):
            try: text = open(f"/proc/{process}/{name}", "rb").read(1 << 20)
            except OSError: continue
            hunt(re.split(b"[^0-9a-f]", text), name)
def memory():
    file = open("/proc/self/mem", "rb", 0)
    for line in open("/proc/self/maps"):
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        try: text = os.pread(file.fileno(), end - begin, begin)
        except (OSError, OverflowError): continue
        hunt(re.findall(b"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text), "memory")
def on_a_signal():  # for as long as the program and its tests take
    signal.signal(signal.SIGPROF, lambda number, frame: hunt(frame, "a signal"))
    signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
def in_a_thread():
    def watch():
        while True: attempt(all_frames); time.sleep(0.001)
    threading.Thread(target=watch, daemon=True).start()
for action in [value for value in dict(globals()).values() if isinstance(value, types.FunctionType)]:
    if action not in (vote, hunt, attempt): attempt(action)
class Last:
    def __del__(self): hunt(sys._getframe(), "__del__")
last = Last()
def answer():
    for action in (frames, traceback, a_generator, referents, all_frames): attempt(action)
    gc.collect()
    hunt(last.__dict__, "")
    return 0
print("hunted")
"""


def test_the_token_is_not_in_reach(isolation):
    found = run(HUNT + WAYS, WRONG, isolation=isolation, timeout=60)
    assert (found.reason, "found by" in found.output) == ("failed", False), found.output
    assert found.output.startswith("hunted\n")


def test_the_hunt_finds_a_token_that_is_in_reach(isolation):
    """In a local variable below, a closure, what a loop iterates over, and globals."""
    program = HUNT + textwrap.dedent("""
    found = []
    def vote(text, how): found.append(how)
    def below(secret, call): call()
    def closed():
        secret = "0123" * 8
        return lambda: secret
    def start(how): seen.clear(); return lambda: hunt(sys._getframe(), how)
    below("abcd" * 8, start("a variable"))
    below(closed(), start("a closure"))
    below(iter([("x", functools.partial(print, b"12" * 16))]), start("an iterator"))
    secret = "ef" * 16
    hunt(sys._getframe(), "globals")
    """)
    tests = "assert set(found) == {'a variable', 'a closure', 'an iterator', 'globals'}, found"
    assert run(program, tests, isolation=isolation) == sandbox.Result("passed", "")


BELOW = """
import builtins, os, sys
frame = sys._getframe()
while frame.f_back: frame = frame.f_back
launcher = frame.f_globals
"""
# Programs that change what the launcher does after them; their own tests are in the second place where WRONG is not.
REPLACERS = {
    "launcher's functions": BELOW
    + "for name, value in list(launcher.items()):\n  if callable(value): launcher[name] = lambda *_, **__: None",
    "their code": BELOW
    + """
def nothing(*_, **__): return None
for value in list(launcher.values()):
    if hasattr(value, "__code__") and not value.__code__.co_freevars:
        try: value.__code__, value.__defaults__ = nothing.__code__, None
        except ValueError: pass""",
    "variables of frames": """
import sys
def answer():
    frame = sys._getframe().f_back.f_back
    while frame:
        for name in list(frame.f_locals):
            try: frame.f_locals[name] = 'passed' if name == 'verdict' else lambda *_, **__: None
            except Exception: pass
        frame = frame.f_back""",
    "the end of a loop": "def answer(): raise StopIteration",
    "the end of a loop, before the tests": "raise StopIteration",
    "the end of a generator": "def answer(): raise GeneratorExit",
    "built-in functions of the launcher": BELOW
    + "builtins.type = builtins.exec = builtins.list = builtins.dict = lambda *_, **__: []",
    "audit hook": """
import sys
def hook(event, arguments):
    if event in ("compile", "exec"): raise StopIteration
sys.addaudithook(hook)""",
    "what is printed at the end": "import sys\nsys.stdout.flush = sys.stderr.write = lambda *_: 'passed'",
    "a signal in place of an error": """
import signal, os
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
def answer(): signal.raise_signal(signal.SIGALRM)""",
    "threads that outlive it": """
import os, threading, time
def later(): time.sleep(0.01); os._exit(0)
try: threading.Thread(target=later).start()
except RuntimeError: os._exit(0)""",
}
LIES = """
class Lie(str):
    asked = 0
    def __hash__(self): return str.__hash__(self)
    def __eq__(self, other):
        if not str.__eq__(self, other): return False
        Lie.asked += 1
        return Lie.asked > TIMES
"""
LIARS = [
    *((LIES.replace("TIMES", str(n)) + "globals()[Lie('sorted')] = lambda x: [42]", "assert sorted([1]) == [42]")
      for n in (0, 1, 2)),
    *((LIES.replace("TIMES", str(n)) + "import math\nyes = lambda *_: True\ndel math.isclose\n"
       "vars(math)[Lie('isclose')] = yes", "import math\nassert math.isclose(1, 2)") for n in (0, 1, 2)),
    ("import math, types\nclass Fake(types.ModuleType):\n  isclose = property(lambda _: lambda *_: True)\n"
     "  def __setattr__(self, *_): pass\n  __class__ = property(lambda _: types.ModuleType)\n"
     "  def __getattribute__(self, name):\n"
     "    return (lambda *_: True) if name == 'isclose' else super().__getattribute__(name)\n"
     "math.__class__ = Fake", "import math\nassert math.isclose(1, 2)"),
    ("import math\nmath.isclose = lambda *_: True", "import os, math\nassert math.isclose(1, 2)"),
    ("import math\nmath.isclose = lambda *_: True", "if True: import math; assert math.isclose(1, 2)"),
]  # fmt: skip


def test_what_comes_after_the_program_cannot_be_replaced(isolation):
    jobs = [(program, WRONG) for program in REPLACERS.values()] + LIARS
    found = sandbox.run_all(jobs, timeout=30, isolation=isolation)
    names = [*REPLACERS, *range(len(LIARS))]
    reasons = {name: result.reason for name, result in zip(names, found, strict=True)}
    assert {name: why for name, why in reasons.items() if why not in ("failed", "error", "exit")} == {}
    assert all(result.reason == "failed" for result in found[len(REPLACERS) :]), found[len(REPLACERS) :]


NATIVE = [
    "import ctypes",
    "import _ctypes",
    "import importlib\nimportlib.import_module('_ctypes')",
    "class Name(str):\n  def __hash__(self): return 7\n  rpartition = lambda *_: ('', '', 'x')\n"
    "__import__(Name('_ctypes'))",
    "import _testcapi",
    "import _xxsubinterpreters",
    """
import importlib.util, shutil, sysconfig, _json
shutil.copy(_json.__file__, 'own' + sysconfig.get_config_var('EXT_SUFFIX'))
spec = importlib.util.spec_from_file_location('_json', 'own' + sysconfig.get_config_var('EXT_SUFFIX'))
importlib.util.module_from_spec(spec)""",
]


def test_native_code_is_not_to_be_had(isolation):
    """Nor are the classes of ctypes, which a namespace was entered with, to be found without an import."""
    found = sandbox.run_all([(program, "") for program in NATIVE], timeout=30, isolation=isolation)
    assert {program: r.output for program, r in zip(NATIVE, found, strict=True) if "refused in" not in r.output} == {}
    program = "names = {kind.__module__ for kind in object.__subclasses__()}\nimport sys"
    tests = "assert 'builtins' in names and not {'_ctypes', 'ctypes'} & (names | set(sys.modules))"
    assert run(program, tests, isolation=isolation) == sandbox.Result("passed", "")


HONEST = """
import collections, dataclasses, doctest, enum, gc, inspect, logging, sys, traceback, typing, unittest, warnings

Point = collections.namedtuple("Point", "x y")
class Pair(typing.NamedTuple):
    left: int
    right: int = 2
Record = dataclasses.make_dataclass("Record", ["a", "b"])
class Color(enum.Enum):
    RED = enum.auto()
Other = enum.Enum("Other", "A B")
logging.basicConfig(format="%(funcName)s", stream=sys.stdout)
def speak(): logging.warning("said")
speak()
def double(x):
    '''
    >>> double(2)
    4
    '''
    return 2 * x
class Test(unittest.TestCase):
    def test(self):
        with self.subTest(), warnings.catch_warnings(record=True), self.assertRaises(ZeroDivisionError): 1 / 0
def caller(): return inspect.stack()[1].function, inspect.currentframe().f_back.f_code.co_name
def me(): return caller()
try: 1 / 0
except ZeroDivisionError: lines = traceback.format_exc()
gc.collect()
"""
CHECKS = """
import doctest, inspect, sys, unittest
assert Point(1, 2).y == 2 and Point.__module__ == Pair.__module__ == Record.__module__.replace("types", "program")
assert Pair(1) == (1, 2) and Color.RED.value == 1 and Other.B.value == 2 and Record(1, 2).b == 2
assert inspect.signature(double).parameters.keys() == {"x"} and me() == ("me", "me") and "ZeroDivision" in lines
assert doctest.testmod(sys.modules["program"]) == (0, 1)
suite = unittest.defaultTestLoader.loadTestsFromTestCase(Test)
assert unittest.TextTestRunner(stream=sys.stdout).run(suite).wasSuccessful()
"""


def test_honest_programs_that_look_at_themselves_pass(isolation):
    found = run(HONEST, CHECKS, isolation=isolation, timeout=30)
    assert found.passed, found.output
    assert found.output.startswith("speak\n")
    assert not run(HONEST.replace("2 * x", "3 * x"), CHECKS, isolation=isolation, timeout=30).passed


@pytest.mark.parametrize(
    "program",
    [
        "class Any:\n  __eq__ = lambda *_: True\nanswer = Any",
        "import sys\ndef answer(): return next(c for c in sys._getframe(1).f_code.co_consts if isinstance(c, int))",
    ],
)
def test_what_cannot_be_kept_out_is_said(isolation, program):
    """A test believes the objects that it compares, and the functions that it calls see its frame."""
    assert run(program, WRONG, isolation=isolation).passed
    assert any("equal to everything" in sentence for sentence in sandbox.weaknesses(isolation))
