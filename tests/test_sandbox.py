"""Code of completions in the sandbox: what hostile code comes to, that no pass is forged, and that nothing is left behind."""
import gc
import json
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_nb import rewards
from grpo_nb.tasks import sandbox
from grpo_nb.tasks.code import cases_of, run_tests
from grpo_nb.tasks.look import check_python_modules, code_of, why_not_run
from grpo_nb.tasks.plain import NotPlain, decode, encode, same
from grpo_nb.tasks.sandbox import (
    PROMISES, CodeError, Limits, SandboxError, create_locked_down_function, execute_with_time_limit, room_for, sandbox_limits,
    template, why_not_here,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")

# `m` gets a module in spite of the list, as somebody does who knows how: every module that is loaded is reachable.
M = """
import sys
def m(name): return sys.modules[name]
"""
SECRET = "a secret of the trainer"

# name: (code, what comes of f(3) behind the walls alone, whether reading the code refuses it)
# "error: X" is an exception that the code got, and "= x" a value that it returned: it went on, and had gained nothing.
HOSTILE = {
    "fork": ("def f(n): m('os').fork()", "error: PermissionError", True),
    "fork bomb": ("def f(n):\n    while True:\n        try: m('os').fork()\n        except OSError: pass", "time", True),
    "fork by clone, through ctypes": ("def f(n): return m('ctypes').CDLL(None).syscall(56, 17, 0, 0, 0, 0)", "= -1", True),
    "vfork and exec": ("def f(n): m('_posixsubprocess')", "error: KeyError", True),
    "exec in place": ("def f(n): m('os').execv('/bin/sh', ['sh', '-c', 'true'])", "error: PermissionError", True),
    "os.system": ("def f(n): return m('os').system('touch PATH')", "= -1|= 32512", True),
    "posix_spawn": ("def f(n): m('os').posix_spawn('/bin/true', ['true'], {})", "error: PermissionError", True),
    "infinite loop": ("def f(n):\n    while True: pass", "time", False),
    "infinite loop at import": ("while True: pass\ndef f(n): return n * n", "time", False),
    "loop that catches everything":
        ("def f(n):\n    while True:\n        try: 1 / 0\n        except BaseException: pass", "time", False),
    "sleep": ("import time\ndef f(n): time.sleep(10**6)", "time", False),
    "10 GB": ("def f(n): return len(bytearray(10 * 2**30))", "memory", False),
    "memory, bit by bit": ("def f(n):\n    a = []\n    while True: a.append(bytes(2**22))", "memory", False),
    "a large number": ("def f(n): return len(str(10 ** (10 ** 9)))", "memory|time|error: ValueError", False),
    "a large power": ("def f(n): return 9 ** 9 ** 9", "memory|time", False),
    "the repr of a large number": ("def f(n): return repr(1 << 10**6)", "error: ValueError", False),
    "a large number, returned": ("def f(n): return 1 << 10**8", "output|memory|time", False),
    "a large text, returned": ("def f(n): return 'x' * 10**7", "output", False),
    "printing for ever": ("def f(n):\n    while True: print('x' * 1000)", "output", False),
    "printing for ever, and catching that":
        ("def f(n):\n    while True:\n        try: print('x' * 1000)\n        except BaseException: pass", "time", False),
    "printing for ever, past Python": ("def f(n):\n    while True: m('os').write(1, b'x' * 10**6)", "time", True),
    "deep recursion": ("def f(n): return f(n + 1)", "error: RecursionError", False),
    "deeper recursion": ("import sys\ndef f(n):\n    sys.setrecursionlimit(10**9)\n    return f(n + 1)", "memory|died|time", False),
    "a catastrophic regex": ("import re\ndef f(n): return re.match('^(a+)+$', 'a' * 40 + 'b')", "time", False),
    "nested lists": ("def f(n):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a", "result", False),
    "a list in itself": ("def f(n):\n    a = []\n    a.append(a)\n    return a", "result", False),
    "a billion laughs":
        ("def f(n):\n    a = ['ha']\n    for _ in range(60): a = [a, a]\n    return a", "memory|time|died", False),
    "/etc/passwd": ("def f(n): return open('/etc/passwd').read()", "error: NameError", True),
    "/etc/passwd, by io":
        ("import io\ndef f(n): return io.open('/etc/passwd').read()", "error: PermissionError|error: FileNotFoundError", False),
    "/etc/passwd, by ctypes": ("def f(n): return m('ctypes').CDLL(None).open(b'/etc/passwd', 0)", "= -1", True),
    "home": ("def f(n): return m('os').listdir(m('os').path.expanduser('~'))", "error: PermissionError", True),
    "the trainer's file": ("def f(n): return m('os').open('PATH', 0)", "error: PermissionError", True),
    "/proc/self/environ": ("import io\ndef f(n): return io.open('/proc/self/environ').read()", "error: PermissionError", False),
    "the environment": ("def f(n): return 'SANDBOX_TEST_SECRET' in m('os').environ or 'HOME' in m('os').environ", "= False", True),
    "the parent's memory": ("import io\ndef f(n): return io.open('/proc/PID/mem', 'rb').read(1)", "error: PermissionError", False),
    "the parent's memory, by a call":
        ("def f(n): return m('ctypes').CDLL(None).process_vm_readv(PID, 0, 0, 0, 0, 0)", "= -1", True),
    "ptrace": ("def f(n): return m('ctypes').CDLL(None).ptrace(16, PID, 0, 0)", "= -1", True),
    "writing outside": ("def f(n): m('os').open('PATH.new', 65)", "error: PermissionError", True),
    "a symbolic link": ("def f(n): m('os').symlink('/etc/passwd', 'PATH.link')", "error: PermissionError", True),
    "unlink": ("def f(n): m('os').unlink('PATH')", "error: PermissionError", True),
    "out of its root": ("def f(n): m('os').chroot('.')", "error: PermissionError", True),
    "a socket": ("def f(n): m('socket').create_connection(('127.0.0.1', PORT), 1)", "error: PermissionError", True),
    "a datagram": ("def f(n): m('socket').socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))", "error: PermissionError", True),
    "DNS":
        ("def f(n): m('socket').getaddrinfo('example.com', 80)", "error: gaierror|error: PermissionError|error: LookupError", True),
    "kill the parent": ("def f(n): m('os').kill(PID, 9)", "error: PermissionError", True),
    "kill the template": ("def f(n): m('os').kill(m('os').getppid(), 9)", "error: PermissionError|error: OverflowError", True),
    "kill everybody": ("def f(n): m('os').killpg(0, 9)", "error: PermissionError", True),
    "import ctypes": ("def f(n):\n    import ctypes\n    return ctypes.string_at(0)", "error: ImportError", True),
    "a null pointer": ("def f(n): return m('ctypes').string_at(0)", "died", True),
    "machine code": ("def f(n): m('mmap')", "error: KeyError", True),
    "executable memory": ("def f(n):\n    libc = m('ctypes').CDLL(None)\n    return libc.mprotect(0, 4096, 7)", "= -1", True),
    "import os": ("import os\ndef f(n): return os.getcwd()", "error: ImportError", True),
    "__import__": ("def f(n): return __import__('os').getcwd()", "error: ImportError", True),
    "__subclasses__":
        ("def f(n):\n    for c in ().__class__.__base__.__subclasses__():\n        if c.__name__ == '_wrap_close':\n"
         "            return c.__init__.__globals__['system']('touch PATH.new')", "= -1|= 32512", True),
    "the builtins of a module":
        ("import re\ndef f(n): return re.__builtins__['open']('/etc/passwd')", "error: PermissionError", True),
    "eval": ("def f(n): return eval('1')", "error: NameError", True),
    "sys.exit(0)": ("import sys\ndef f(n): sys.exit(0)", "exit", False),
    "sys.exit(0) at import": ("import sys\nsys.exit(0)\ndef f(n): return n * n", "exit", False),
    "os._exit(0)": ("def f(n): m('os')._exit(0)", "died", True),
    "abort": ("def f(n): m('os').abort()", "died", True),
    "atexit": ("def f(n): m('atexit')", "error: KeyError", True),
    "quit": ("def f(n): quit()", "error: NameError", False),
    "threads": ("def f(n):\n    import threading\n    threading.Thread(target=print).start()", "error: ImportError", True),
    "a thread, by _thread": ("def f(n): m('_thread').start_new_thread(print, ())", "error: RuntimeError", True),
    "deaf to SIGTERM":
        ("def f(n):\n    s = m('_signal')\n    for k in (1, 2, 3, 15): s.signal(k, lambda *a: None)\n    while True: pass",
         "time", True),
    "a timer": ("def f(n): m('_signal').setitimer(0, 1)", "error: itimer_error|error: PermissionError", True),
    "closing descriptors":
        ("def f(n):\n    for d in (0, 1, 2): m('os').close(d)\n    print('on')\n    return 0", "= 0", True),
    "closing every descriptor":
        ("def f(n):\n    for d in range(100):\n        try: m('os').close(d)\n        except OSError: pass\n    return 9",
                                 "died", True),
    "closing the line, and going on": ("def f(n):\n    m('os').closerange(3, 99)\n    while True: pass", "died", True),
    "more files":
        ("def f(n): m('resource').setrlimit(m('resource').RLIMIT_NOFILE, (99, 99))",
         "error: PermissionError|error: ValueError", True),
    "a patched comparison":
        ("import math, operator\nmath.isclose = operator.eq = lambda *a, **k: True\ndef f(n): return 0", "= 0", False),
    "patched builtins":
        ("b = m('builtins')\nb.isinstance = b.len = b.type = b.float = lambda *a: True\ndef f(n): return 0",
         "= 0|died|error: .*|result|exit", True),
    "a patched encoder": ("m('grpo_nb.tasks.child').encode = lambda v: b'{\"value\": 9}'\ndef f(n): return 0", "result", True),
    "an equal to everything": ("class Yes:\n    def __eq__(self, other): return True\ndef f(n): return Yes()", "result", False),
    "a number that is equal to everything":
        ("class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(n): return Yes(1)",
         "= 1", False),
    "a text that is equal to everything":
        ("class Yes(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef f(n): return Yes('9')",
         "= 9", False),
    "NaN": ("def f(n): return float('nan')", "= nan", False),
    "infinity": ("def f(n): return float('inf')", "= inf", False),
    "a wrong type that looks right": ("def f(n): return '9'", "= 9", False),
    "a class in the message":
        ("class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(n): raise E", "error: E", False),
    "an endless message":
        ("class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(n): raise E", "time", False),
    "a generator": ("def f(n): yield 9", "result", False),
    "a coroutine": ("async def g(n): return 9\ndef f(n): return g(n)", "result", False),
    "bidi": ("def f(n): return 0 # \u202e\u2066 9 nruter", "= 0", True),
    "lone surrogates": ("def f(n): return chr(0xD800) + chr(0)", "= .*", False),
    "print lone surrogates": ("def f(n):\n    print(chr(0xD800))\n    return 0", "= 0", False),
    "the frames of the caller":
        ("import sys\ndef f(n):\n    frame, found = sys._getframe(), []\n    while frame:\n"
         "        found += [v for v in frame.f_locals.values() if v == 9]\n"
         "        frame = frame.f_back\n    return found[0]", "error: IndexError", True),
    "every object there is":
        ("def f(n): return [o for o in m('gc').get_objects() if type(o) is tuple and o and o[-1] == f'expected {n * n}'][0]",
                              "error: IndexError|error: .*", True),
    "the next message on the line":
        ("def f(n):\n    for d in range(3, 60):\n        try: return m('os').read(d, 100)\n        except OSError: pass",
         "time", True),
}
FORGED = { # what is written to the result's line by the code itself
    "a value": 'b\'{"value":9,"printed":{"b":""}}\'',
    "no error": 'b\'{"value":null,"printed":{"b":""}}\'',
    "passed":
        'b\'{"passed":true}\'', "true": "b'true'", "nothing": "b''", "no JSON": "b'\\xff' * 9",
    "a question": 'b\'{"ask":["f",{"t":[3]},{"d":[]}]}\'',
}
FORGE = M + """
import struct
def forge(data):
    for d in range(3, 60):
        try: m('os').write(d, struct.pack('!I', len(data)) + data)
        except OSError: pass
"""
TESTS = {
    "a value": [[[3], 9]],
    "code": ["assert f(3) == 9"],
    "check": "def check(candidate):\n    assert candidate(3) == 9, 'expected 9'\n    assert not candidate(3) != 9\n",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A file with a secret, a port that listens, this process: what must be as it was when all is over."
    path = tmp_path_factory.mktemp("sandbox") / "secret.txt"
    path.write_text(SECRET)
    os.environ["SANDBOX_TEST_SECRET"] = SECRET
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield path, server
        with pytest.raises(BlockingIOError): server.accept()
    assert path.read_text() == SECRET and [p.name for p in path.parent.iterdir()] == ["secret.txt"]
    del os.environ["SANDBOX_TEST_SECRET"]


def written(code, world):
    "The code with what it needs to know about this machine."
    path, server = world
    return M + code.replace("PATH", str(path)).replace("PORT", str(server.getsockname()[1])).replace("PID", str(os.getpid()))


def outcome(code, *arguments, seconds=0.4, **options):
    "What comes of a call, in a word or two."
    try: return f"= {create_locked_down_function(code, 'f', seconds, 64, 256, look=False, **options)(*arguments)}"
    except CodeError as error: return f"error: {error.name}" if error.kind == "error" else error.kind


def descendants():
    "The processes that this one has begun, and those that they have."
    rows = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: rows.append((stat.parent.name, stat.read_text().rpartition(")")[2].split()[1]))
        except OSError: continue # it has ended meanwhile
    found, more = set(), {str(os.getpid())}
    while more:
        more = {pid for pid, parent in rows if parent in more}
        found |= more
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_comes_to_this(name, world):
    code, expected, _ = HOSTILE[name]
    found = outcome(written(code, world), 3, seconds=0.4 if "time" in expected else 30) # a busy machine is slow to begin
    assert re.fullmatch(expected, found), (name, found)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "time" not in HOSTILE[name][1]])
def test_hostile_code_earns_nothing(name, world):
    "With the walls alone, against a `check`, of which the judge reads the expected value; what a call comes to is the test above."
    might = HOSTILE[name][1].startswith("= 9") # else no value that is compared earns anything either
    for tests in [TESTS["check"]] + [TESTS["a value"]] * might:
        assert run_tests(written(HOSTILE[name][0], world), tests, "f", Limits(2, 64, 256), look=False).share == 0, name


@pytest.mark.parametrize("name", HOSTILE)
def test_reading_the_code_refuses_what_it_can_see(name):
    assert bool(why_not_run(HOSTILE[name][0].replace("m('", "sys.modules('"))) == HOSTILE[name][2]


@pytest.mark.parametrize("tests", TESTS)
@pytest.mark.parametrize("name", FORGED)
def test_an_answer_that_the_code_writes_itself_earns_nothing_that_it_could_not_return(name, tests):
    "A forged 9 is a 9 that the code returns without looking; and without knowing it, nothing is passed."
    for place in ("forge(DATA)\ndef f(n): return 0", "def f(n):\n    forge(DATA)\n    return 0"):
        code = FORGE + place.replace("DATA", FORGED[name])
        share = run_tests(code, TESTS[tests], "f", Limits(2), look=False).share
        assert share == 0 or name == "a value"
    guess = FORGE + "def f(n):\n    forge(DATA)\n    return 0".replace("DATA", FORGED[name].replace("9,", "7,"))
    assert run_tests(guess, TESTS[tests], "f", Limits(2), look=False).share == 0


JUDGED = [
    ("def abs(x): return 0\ndef f(n): return 0", "assert abs(f(3) - 9) < 1e-6"),
    ("def all(x): return True\ndef sorted(x): return []\ndef f(n): return 0", "assert all(f(n) == n * n for n in range(1, 4))"),
    ("def near(a, b): return True\ndef f(n): return 0", "def near(a, b): return abs(a - b) < 1e-6\nassert near(f(3), 9)"),
    ("def isclose(a, b): return True\ndef f(n): return 0", "from math import isclose\nassert isclose(f(3), 9)"),
    ("def math(): pass\ndef f(n): return 0", "import math\nassert math.isclose(f(3), 9)"),
    ("def candidate(n): return 9\ndef f(n): return 0", "def check(candidate):\n    assert candidate(3) == 9"),
    ("def check(f): return True\ndef f(n): return 0", "def check(candidate):\n    assert candidate(3) == 9\ncheck(f)"),
    ("def f(n): raise StopIteration", "assert all(map(lambda n: f(n) == n * n, range(1, 4)))"),
    ("def f(n): raise AssertionError", "assert f(3) == 9"), ("def f(n): raise SystemExit(0)", "assert f(3) == 9"),
    ("import sys\nsys.exit(0)\ndef f(n): return 9", "assert f(3) == 9"), ("def f(n): yield 9", "assert list(f(3)) == [9]"),
]


@pytest.mark.parametrize("code, tests", JUDGED)
def test_what_a_completion_defines_is_not_what_the_tests_mean(code, tests):
    assert run_tests(code, tests, "f", Limits(10), look=False).share == 0


def test_a_completion_that_dies_in_one_assert_is_asked_the_next():
    code = M + "def f(n):\n    if n == 1: m('os')._exit(0)\n    return n"
    assert run_tests(code, [f"assert f({n}) == {n}" for n in range(4)], "f", Limits(30), look=False).share == 3 / 4


def test_reading_odd_text_takes_no_time():
    began = time.monotonic()
    fences = "```" + " " * 200000, "```\n" * 50000, "```py\n" + "def f(): pass\n" * 3000, "`" * 100000, "~~~ \t" * 30000
    for text in (*fences, " " * 200000):
        code_of(text)
        why_not_run(text)
    codes = "(" * 40000, "[{" * 80, "-" * 49000 + "1", "f'{" * 150, "lambda:" * 6000, "a if b else " * 3000, "x = " * 9000 + "1"
    for code in codes: why_not_run(code)
    assert time.monotonic() - began < 20


def test_what_is_expected_is_nowhere_in_the_completions_process():
    "Everything that the process has read, and every object that it holds, while the tests run."
    spy = M + """
def f(n):
    held = m('gc').get_objects()
    word = ''.join(['KEYWORD', '_', 'expected'])
    return len([o for o in held if type(o) in (dict, list, tuple, set) and len(o) < 50 and word in repr(o)])
"""
    for tests in ([[["KEYWORD_given"], "KEYWORD_expected"]], ["assert f('KEYWORD_given') == 'KEYWORD_expected'"]):
        found = run_tests(spy, tests, "f", Limits(20), look=False)
        assert "returned 0" in repr(found) or "does not hold" in repr(found)


def test_what_a_completion_may_import_works_behind_the_walls():
    "Some of it imports more when it is first used, and some of that from C."
    code = """
import collections, copy, datetime, decimal, enum, fractions, functools, heapq, json, math, random, re, statistics, string, time
from dataclasses import dataclass, field
@dataclass(order=True)
class A:
    x: int = 1
    y: list = field(default_factory=list)
class E(enum.Enum): ONE = 1
def f(n):
    time.sleep(0.001)
    return [math.sqrt(n), re.sub('a', 'b', 'aa'), statistics.median([1, 2]), str(datetime.date(2020, 1, 1)),
            time.strptime('7', '%d').tm_mday, datetime.datetime.strptime('2020', '%Y').year,
            str(decimal.Decimal('1.1') / 3)[:4], json.dumps(A().x),
            f'{n:>3}', '\\N{BULLET}', 'ß'.encode('utf-16-le'), copy.deepcopy(A(2)).x, E(1).name, str(fractions.Fraction('0.5')),
            str(datetime.datetime.now())[:2], collections.Counter('aab'), len(str(3 ** 8000)), 'ä'.encode('idna'),
            string.Template('$a').substitute(a=1), heapq.nsmallest(1, [2, 1]), functools.lru_cache(len)('ab'),
            time.localtime(0).tm_year, random.Random(1).choice([4])]
"""
    assert create_locked_down_function(code, seconds=30)(4) == [
        2.0, "bb", 1.5, "2020-01-01", 7, 2020, "0.36", "1", "  4", "\N{BULLET}", b"\xdf\0", 2, "ONE", "1/2", "20", {"a": 2, "b": 1},
        3817, b"xn--4ca", "1", [1], 2, 1970, 4]


def test_one_completion_leaves_nothing_to_the_next():
    dirty = M + """
import math, random
math.pi, random.random, sys.left = 3, (lambda: 9), 'behind'
m('builtins').sum = lambda a: 9
m('grpo_nb.tasks.plain').encode = m('grpo_nb.tasks.child').encode = lambda v: b'9'
def f(n): return 0
"""
    outcome(dirty, 3)
    clean = "import math, random, sys\ndef f(n): return [math.pi > 3.1, sum([n, n]), hasattr(sys, 'left'), random.random()]"
    first, second = (create_locked_down_function(clean)(3) for _ in range(2))
    assert first[:3] == [True, 6, False] and first == second, "and the same completion gets the same"


def test_nothing_is_left_running():
    template()
    before = descendants()
    functions = [create_locked_down_function("def f(n):\n    while n: pass\n    return n", seconds=0.2) for _ in range(4)]
    with pytest.raises(TimeoutError): functions[0](1)
    assert functions[1](0) == 0
    assert len(descendants() - before) == 3
    functions[1].close()
    del functions
    gc.collect() # and no further order is needed
    until = time.monotonic() + 10
    while descendants() - before and time.monotonic() < until: time.sleep(0.02)
    assert not descendants() - before


def test_a_template_that_was_killed_is_begun_again():
    f = create_locked_down_function("def f(n): return n + 1")
    process = template().process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(CodeError, match="ended|line"): f(1)
    assert f(1) == 2 and create_locked_down_function("def g(n): return n")(3) == 3


@pytest.mark.parametrize("without, more", [((), []), (("second",), []), (("filter", "second"), ["processes", "others"])], ids=str)
def test_what_holds_is_measured(without, more):
    limits = sandbox_limits(without)
    assert list(limits) == list(PROMISES) and set(more) <= set(limits.missing)
    if not without: assert limits.missing == [] and limits.walls["filter"] == "" and "as tried here" in repr(limits)
    if without == ("second",): assert limits.missing == [], "the filter alone holds everything: a container without namespaces"


def test_a_machine_without_walls_refuses_and_says_what_to_accept(monkeypatch):
    without = ("filter", "second")
    with pytest.raises(SandboxError, match="no other process is signalled.*filter: left out.*accept=") as caught:
        room_for(without=without)
    accepted = json.loads(re.search(r"accept=(\[.*\])", str(caught.value))[1].replace("'", '"'))
    with room_for(accept=accepted, without=without) as room: room.ask({"do": "load", "code": "1", "modules": []})
    bare = sandbox_limits(without)
    monkeypatch.setattr(sandbox, "sandbox_limits", lambda without=(): bare)
    with pytest.raises(SandboxError, match="no process is started"): create_locked_down_function("def f(): pass")
    with pytest.raises(RuntimeError, match="code_tests: this machine"): rewards.get("code_tests")


def test_a_filter_that_the_kernel_refuses_is_found_before_anything_runs():
    from grpo_nb.tasks.walls import filter_program, why_no_filter_set
    assert why_no_filter_set(filter_program()) == "" and "refuses" in why_no_filter_set(filter_program()[:8])


def test_a_machine_that_cannot_fork_says_so(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(SandboxError, match="cannot fork"): sandbox.Template()


# functions, as notebooks that were written for Unsloth use them

def test_names_of_the_notebooks():
    ok, info = check_python_modules("def strategy(board):\n    import math\n    from typing import Callable\n    return '0'")
    assert ok and info == {"stdlib": ["math", "typing"], "non_stdlib": [], "relative_imports": 0}
    ok, info = check_python_modules("def strategy(board):\n    from numpy import matmul\n    return '0'")
    assert not ok and info["non_stdlib"] == ["numpy"] and "error" not in info
    ok, info = check_python_modules("def a")
    assert not ok and "error" in info
    lost = create_locked_down_function("def import_numpy():\n    np.matmul\n    print('Success')")
    with pytest.raises(Exception, match="np"): lost()
    assert create_locked_down_function("def add(a, b):\n    def adder(a): return a + b\n    return adder(b) + b")(10, 20) == 60

    class Game:
        def __init__(self): self.moves, self.board = [], [[0] * 4] * 4
    game = Game()

    @execute_with_time_limit(5)
    def play(strategy, game, *, seconds=3):
        while len(game.moves) < seconds: game.moves.append(strategy(list(game.board)))
        return len(game.moves), "success"

    strategy = create_locked_down_function("def strategy(board): return 'W' if len(board) == 4 else 'A'")
    assert play(strategy, game, seconds=4) == (4, "success") and game.moves == ["W"] * 4, "the game of the notebook is played here"
    assert play.__name__ == "play" and type(game.moves[0]) is str


@pytest.mark.parametrize("where", ["here", "thread"])
def test_a_time_limit(where):
    @execute_with_time_limit(0.3)
    def forever():
        while True: time.sleep(0.01)
    slow = create_locked_down_function("def f():\n    while True: pass", seconds=60)
    timed = execute_with_time_limit(0.3)(lambda: slow())
    found = []
    def tried():
        for call in (forever, timed):
            began = time.monotonic()
            try: call()
            except TimeoutError as error: found.append((str(error), time.monotonic() - began))
    if where == "here": tried()
    else:
        thread = threading.Thread(target=tried)
        thread.start()
        thread.join()
    assert "forever took longer than 0.3 s" in found[0][0] and len(found) == 2 and all(took < 20 for _, took in found)
    assert execute_with_time_limit(5)(lambda seconds: seconds)(seconds=7) == 7
    with pytest.raises(KeyError): execute_with_time_limit(5)({}.__getitem__)("x")


def test_many_threads_use_their_functions_at_once():
    f = create_locked_down_function("def f(n): return n * n")
    found = [None] * 8
    def work(k):
        own = create_locked_down_function(f"def g(n): return n + {k}")
        found[k] = all(own(n) == n + k and f(n) == n * n for n in range(20))
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert found == [True] * 8


def test_a_fork_of_this_process_has_its_own_template():
    f = create_locked_down_function("def f(n): return n")
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try: os.write(write, str(create_locked_down_function("def g(n): return n + 1")(1) + f(40)).encode())
        finally: os._exit(0)
    assert f(5) == 5 and os.read(read, 10) == b"42" and os.waitpid(pid, 0)[1] == 0 and f(3) == 3
    os.close(read)
    os.close(write)


def test_numpy_where_it_is_allowed():
    code = "import numpy as np\ndef f(a): return np.array(a) @ np.array(a), np.float64(1.5), np.arange(3) > 1"
    with pytest.raises(CodeError, match="imports numpy"): create_locked_down_function(code)
    f = create_locked_down_function(code, modules=("numpy",), seconds=60)
    assert f([[1, 2], [3, 4]]) == ([[7, 10], [15, 22]], 1.5, [False, False, True])
    reads = "import numpy as np\ndef f(n): return np.fromfile('/etc/passwd')"
    assert outcome(reads, 3, modules=("numpy",), seconds=60).startswith("error: ")


WRONG = [
    (lambda: create_locked_down_function(3), TypeError, "code=3 must be the text"),
    (lambda: create_locked_down_function("def f(): pass", name="g"), CodeError, "defines no function 'g'; it defines f"),
    (lambda: create_locked_down_function("x = 1"), CodeError, "defines no function"),
    (lambda: create_locked_down_function("def f(): pass", seconds=0), ValueError, "seconds=0"),
    (lambda: create_locked_down_function("def f(): pass", seconds="5"), ValueError, "seconds='5'"),
    (lambda: create_locked_down_function("def f(): pass", memory_mb=0), ValueError, "memory_mb=0"),
    (lambda: create_locked_down_function("def f(): pass", output_kb=1.5), ValueError, "output_kb=1.5"),
    (lambda: create_locked_down_function("def f(): pass", modules="numpy"), ValueError, "modules='numpy' must be names"),
    (lambda: create_locked_down_function("def f(): pass", modules=("no_such_module",)), SandboxError, "no_such_module"),
    (lambda: create_locked_down_function("def f(): pass", accept=("file",)), ValueError, "Did you mean 'files'"),
    (lambda: create_locked_down_function("def f(): pass", accept="files"), ValueError, "accept='files' must be a list"),
    (lambda: create_locked_down_function("def f(): pass", look="no"), ValueError, "look='no'"),
    (lambda: create_locked_down_function("def f(a): pass")(object()), TypeError, "an argument holds object"),
    (lambda: execute_with_time_limit(-1), ValueError, "seconds=-1"),
    (lambda: execute_with_time_limit(5)(3), TypeError, "decorates a function, not 3"),
    (lambda: check_python_modules(None), TypeError, "code=None"),
    (lambda: why_not_here(("x",)), ValueError, "accept='x'"),
    (lambda: rewards.code_tests(second=1), TypeError, "Did you mean 'seconds'"),
    (lambda: rewards.code_tests(seconds=-1), ValueError, "seconds=-1"),
    (lambda: rewards.code_tests(whole="yes"), ValueError, "whole='yes'"),
    (lambda: rewards.code_tests(modules="re"), ValueError, "modules='re'"),
    (lambda: rewards.code_tests(completions=["x"]), ValueError, "needs the column 'tests'"),
    (lambda: rewards.code_tests(completions=["x"], tests=[[]]), ValueError, "holds no test"),
    (lambda: rewards.code_tests(completions=["x"], tests=[5]), ValueError, "tests=5 must be a list of tests"),
    (lambda: cases_of("x = 1", ("math",)) and cases_of("import numpy\nassert f(1)"), ValueError, "the tests import numpy"),
    (lambda: cases_of([{"args": 3, "expected": 4}]), ValueError, "args=3 of a test"),
    (lambda: rewards.code_test, AttributeError, "Did you mean 'code_tests'"),
]


@pytest.mark.parametrize("n", range(len(WRONG)))
def test_wrong_arguments_are_told_in_a_sentence(n):
    call, kind, text = WRONG[n]
    with pytest.raises(kind, match=re.escape(text)): call()


# rewards

def fenced(code): return f"Here it is:\n```python\n{code}\n```\nDone."


SQUARE = fenced("def square(n):\n    return n * n")
FORMS = [
    [[[2], 4], [[3], 9]], '[[[2], 4], [[3], 9]]', [{"args": [2], "expected": 4}, {"args": [], "kwargs": {"n": 3}, "expected": 9}],
    {"inputs": [[2], [3]], "outputs": [4, 9], "fn_name": "square"}, ["assert square(2) == 4", "assert square(3) == 9"],
    "assert square(2) == 4\nassert square(3) == 9",
    "import math\ndef check(candidate):\n  assert all(candidate(n) == n * n for n in [9])\n  assert math.isclose(candidate(1), 1)",
    "for n in range(5):\n    assert square(n) == n ** 2",
    "def near(a, b): return abs(a - b) < 1e-6\nassert near(square(2), 4)\ntry: square('a')\nexcept TypeError: pass\nelse: assert 0",
    [{"args": [2], "expected": 4, "input": None, "output": None}],
]


@pytest.mark.parametrize("tests", FORMS, ids=str)
def test_each_form_of_a_test(tests):
    wrong = fenced("def square(n):\n    return -1")
    chat = [{"role": "assistant", "content": SQUARE}]
    assert rewards.code_tests(completions=[SQUARE, wrong, chat, "no code"], tests=[tests] * 4) == [1, 0, 1, 0]


PROGRAM = "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split())\n    print(a + b)"


@pytest.mark.parametrize("code, share", [
    (PROGRAM, 1), ("while True:\n    try: print(sum(map(int, input().split())))\n    except EOFError: break", 1),
    ("import sys\nd = [*map(int, sys.stdin.buffer.read().split())]\nif len(d) == 2: sys.stdout.buffer.write(b'%d' % sum(d))",
     0.5),
    ("def main():\n    print(5)\nif __name__ == '__main__': main()",
     0.5), ("print('5\\n7')\nimport sys\nsys.exit()", 0.5), ("import os", 0),
    ("raise SystemExit(1)", 0), ("print(5)\n1 / 0", 0),
])
def test_programs(code, share):
    tests = [{"input": "2 3\n", "output": "5\n"}, {"input": "2 3\n3 4", "output": "5 \n7\n\n"}]
    assert run_tests(code, tests).share == share
    assert run_tests(code, {"inputs": ["2 3\n", ["2 3", "3 4"]], "outputs": ["5", ["5", "7"]]}).share == share


def test_rows_without_tests_and_columns_of_another_name():
    assert rewards.code_tests(completions=[SQUARE] * 2, tests=[None, FORMS[0]]) == [None, 1]
    assert rewards.code_tests(column="cases", whole=True)(completions=[SQUARE], cases=[[[[2], 4], [[3], 8]]]) == [0]
    two = fenced("def square(n): return n\ndef cube(n): return n ** 3")
    assert rewards.code_tests(completions=[two] * 2, tests=[[[[2], 8]]] * 2, entry_point=["cube", None]) == [1, 0]
    assert rewards.has_code(completions=[SQUARE, "x = 1", fenced("import os\ndef f(): pass"), "hm"]) == [1, 0, 0, 0]


@pytest.mark.parametrize("tests", [[[[2], 4]], "def check(candidate):\n    assert candidate(2) == 4"], ids=str)
def test_a_method_of_a_class(tests):
    code = fenced("class Solution:\n    def square(self, n: int) -> int:\n        return n * n")
    wrong, names = fenced("class Other: pass"), ["Solution().square"] * 2
    assert rewards.code_tests(completions=[code, wrong], tests=[tests] * 2, entry_point=names) == [1, 0]


def test_a_test_that_gives_a_function_is_the_data_sets_fault():
    code = "def twice(f, n): return f(f(n))"
    with pytest.raises(ValueError, match="gives what is no plain data: assert twice"):
        run_tests(code, "assert twice(lambda n: n + 1, 3) == 5")
    deep = "def f(n):\n    a = []\n    for _ in range(99): a = [a]\n    return a"
    assert run_tests(deep, "assert f([f(1)]) == 1").share == 0, "a completion cannot make it look like that"
    assert run_tests("def f(n): return print", "assert f(1) == 1").share == 0


def test_the_reward_is_one_of_the_library():
    from grpo_nb.tasks.guard import guard
    copy = pickle.loads(pickle.dumps(rewards.code_tests(seconds=3, name="tests")))
    assert copy.options == {"seconds": 3, "name": "tests"} and copy.__name__ == "tests" and copy.at_once == (os.cpu_count() or 1)
    assert guard(copy, timeout=120)(prompts=["?"], completions=[SQUARE], tests=[FORMS[0]]) == [1]
    assert {"code_tests", "has_code"} <= set(rewards.available()) and rewards.get("code_tests") is rewards.code_tests


def test_one_time_for_all_tests_of_a_completion():
    loops = "def f(n):\n    while n > 1: pass\n    return n"
    began = time.monotonic()
    found = run_tests(loops, [[[n], n] for n in range(50)], limits=Limits(0.5))
    assert found.share == 2 / 50 and "time for all tests" in found.failures[2] and time.monotonic() - began < 20
    exits = M + "def f(n):\n    if n == 1: m('os')._exit(0)\n    return n"
    found = run_tests(exits, [[[n], n] for n in range(4)], "f", limits=Limits(30), look=False)
    assert found.share == 3 / 4, "another process for what is left"


@pytest.mark.parametrize("error", ["ValueError", "KeyError", "ZeroDivisionError", "UnicodeDecodeError", "MyOwn"])
def test_tests_may_ask_for_an_exception(error):
    code = f"class MyOwn(Exception): pass\ndef f(n): raise {'UnicodeDecodeError(*[0] * 5)' if 'Uni' in error else error + '(n)'}"
    test = f"try: f(1)\nexcept {'ValueError' if error == 'ValueError' else 'Exception'}: pass\nelse: assert False"
    assert run_tests(code, test).share == 1 and run_tests("def f(n): return n", test).share == 0


@pytest.mark.parametrize("text, code", [
    ("```python\ndef f(): pass\n```", "def f(): pass\n"), ("```\nx = 1\n```", "x = 1\n"), ("def f(): pass", "def f(): pass"),
    ("```py\ndef f(): return 1\n```\nbetter:\n```py\ndef f(): return 2\n```", "def f(): return 2\n"),
    ("```python\ndef f(): return 1\n```\nIt gives\n```\n1 2 3\n```", "def f(): return 1\n"), ("", None), ("```\n```", None),
    ("<think>```python\ndef f(): return 1\n```</think> none",
     None), ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
    ("    ```python\ndef f(): pass\n    ```", "def f(): pass\n"), ("```bash\nls -l\n```", None), ("~~~\nx = 1\n~~~", "x = 1\n"),
    ("I do not know.", None), ("x" * 200000, None),
])
def test_the_code_in_a_text(text, code): assert code_of(text) == code


def test_plain_data_comes_back_as_it_was():
    values = [None, True, -1, 10**30, 0.1, float("inf"), 2j, "é\ud800\u202e", b"\0", [1, [2]], (1, (2,)), {1}]
    values += [frozenset({(1, 2)}), {(1,): {"t": 1}}]
    f = create_locked_down_function("def f(*a, **k): return a, k")
    assert f(*values, a=values) == (tuple(values), {"a": values})
    assert [type(v) for v in decode(encode(values))] == [type(v) for v in values]
    for data in (b"", b"{}", b'{"t":1}', b'{"i":"x"}', b'{"c":[1]}', b'{"d":[1]}', b"infinity", b"[" * 200 + b"]" * 200):
        with pytest.raises(NotPlain): decode(data)
    nan = float("nan")
    assert same([(1, 2.0)], ([1, 2],)) and not same({1: 2}, {"1": 2}) and not same([1], 1) and not same(None, 0) and same(nan, nan)


def test_the_task_of_small_functions():
    "Every right solution is right; one that returns a constant, and one that does nothing, is not."
    import grpo_nb
    task = grpo_nb.tasks.small_functions(n_train=30, n_test=20)
    columns = {name: task.test[name] for name in ("tests", "entry_point")}
    assert task.reward(completions=[fenced(code) for code in task.test["answer"]], **columns) == [1] * 20
    named = zip(columns["entry_point"], columns["tests"], strict=True)
    constant = [fenced(f"def {name}(a): return {json.loads(tests)[0][1]!r}") for name, tests in named]
    assert max(task.reward(completions=constant, **columns)) < 1 and max(task.reward(completions=["No."] * 20, **columns)) == 0
    asked = [{p[0]["content"] for p in part["prompt"]} for part in (task.train, task.test)]
    assert not asked[0] & asked[1] and len(task.train) == 30
    assert grpo_nb.tasks.small_functions(n_train=30, n_test=20).train["tests"] == task.train["tests"]
    for wrong in (dict(n_test=0), dict(n_test=10**6), dict(n_train=10**6), dict(seed="0")):
        with pytest.raises(ValueError, match=next(iter(wrong))): grpo_nb.tasks.small_functions(**wrong)


@pytest.mark.slow
def test_64_completions_in_seconds():
    "As one batch, right, wrong, looping and hostile ones; on two busy cores."
    wrong = "def square(n):\n    while True: pass", "def square(n): return 4", "import sys\ndef square(n): sys.exit(0)"
    texts = [SQUARE, *map(fenced, wrong)]
    began = time.monotonic()
    assert rewards.code_tests(seconds=1)(completions=texts * 16, tests=[FORMS[0]] * 64) == [1, 0, 0.5, 0] * 16
    assert time.monotonic() - began < 120
