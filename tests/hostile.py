"Damage for test_hostile.py: seeded mutations of bytes, JSON and safetensors, and a guard on time and memory."
import contextlib
import copy
import json
import random
import resource
import signal
import struct

DEEP = "\0deep\0"                                       # stands for a list within a list, 100 000 times
EVIL = [None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, -2**63, 2**64, 10**30, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), .5, -0., 1e-320,
        "", "x", "0", "1e999", "../../etc/passwd", "/etc/passwd", "..", ".", "C:\\x", "a\0b", "\ud800", "<script>", "x"*5000, "'; import os", "__class__", "{0.__init__}",
        [], {}, [None], [[]], [1, "a", None], {"": {}}, {"a": [1]}, [0]*300, [1e400, -1], DEEP]


def nodes(x, at=()):
    "Paths of all values in a JSON tree."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from nodes(v, (*at, k))


def some_node(rng, x):
    "A path, chosen level by level, so that long lists do not take all."
    at = ()
    while isinstance(x, (dict, list)) and x and (not at or rng.random() < .8):
        k = rng.choice(list(x)) if isinstance(x, dict) else rng.randrange(len(x))
        at, x = (*at, k), x[k]
    return at


def put(x, at, v):
    if not at: return v
    y = x
    for k in at[:-1]: y = y[k]
    y[at[-1]] = v
    return x


def get(x, at):
    for k in at: x = x[k]
    return x


def near(rng, v):
    "A value much like this one."
    if isinstance(v, bool): return not v
    if isinstance(v, (int, float)): return rng.choice([v + 1, v - 1, -v, v*2, v*1000, v/3 if v == v else 0, str(v), [v], float(v) if abs(v) < 1e300 else 0, v + .5])
    if isinstance(v, str): return rng.choice([v + "x", v[1:], v.upper(), "../" + v, "/" + v, v + "\0", v[::-1], [v], v + "/../" + v, "./" + v, "\\" + v])
    if isinstance(v, list): return rng.choice([v[1:], v + v[:1], v[::-1], v*2, tuple(v) and v[0] if v else None, dict(enumerate(v)), [v]])
    if isinstance(v, dict): return rng.choice([list(v), list(v.items()), {**v, "extra": 1}, {k: None for k in v}])
    return rng.choice(EVIL)


def tree(rng, x):
    "One to three changes to a JSON tree."
    x = copy.deepcopy(x)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = some_node(rng, x); way = rng.randrange(7)
        if way < 2: x = put(x, at, copy.deepcopy(rng.choice(EVIL)))
        elif way < 4: x = put(x, at, near(rng, get(x, at)))
        elif way == 4 and at: del get(x, at[:-1])[at[-1]]
        elif way == 5: x = put(x, at, copy.deepcopy(get(x, some_node(rng, x))))
        elif at and isinstance(at[-1], str): p = get(x, at[:-1]); p[rng.choice([at[-1] + "x", "../" + at[-1], "", "../x", "name", "\ud800"])] = p.pop(at[-1])
    return x


def plain(k): return k if isinstance(k, (str, int, float, bool, type(None))) else repr(k)
def keyed(x): return {plain(k): keyed(v) for k, v in x.items()} if isinstance(x, dict) else [keyed(v) for v in x] if isinstance(x, (list, tuple)) else x


def dump(rng, x, twice=.05):
    "JSON text, with NaN and Infinity, now and then with a key twice."
    s = json.dumps(keyed(x)).replace(json.dumps(DEEP), "["*100_000 + "]"*100_000)
    if isinstance(x, dict) and x and rng.random() < twice: k = rng.choice(list(x)); s = s[:-1] + f", {json.dumps(plain(k) if isinstance(plain(k), str) else 'x')}: {json.dumps(keyed(rng.choice(EVIL[:-1])))}}}"
    return s


def raw(rng, b):
    "One to three changes to bytes."
    b = bytearray(b)
    for _ in range(rng.choice((1, 1, 2, 3))):
        n = len(b); i = rng.randrange(n + 1) if n else 0
        if rng.random() < .3: i = min(i, 200)               # where headers are
        j = min(n, i + rng.choice((1, 2, 8, 64, 1000))); way = rng.randrange(8)
        if way < 3 and i < n:
            for _ in range(rng.choice((1, 1, 2, 8))): b[rng.randrange(i, j) if rng.random() < .5 else rng.randrange(n)] ^= 1 << rng.randrange(8)
        elif way == 3: del b[i:]
        elif way == 4: del b[i:j]
        elif way == 5: b[i:i] = b[i:j]
        elif way == 6: b[i:j] = rng.choice((bytes(j - i), b"\xff"*(j - i), rng.randbytes(j - i), b"9"*(j - i), b"["*(j - i)))
        else: b[:8] = struct.pack("<Q", rng.choice((0, 1, n - 8 if n > 8 else 0, n, n + 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, max(0, rng.randrange(n + 9)))))
    return bytes(b)


def open_st(b): n = struct.unpack("<Q", b[:8])[0]; return json.loads(b[8:8 + n]), b[8 + n:]


def shut_st(head, data):
    h = head if isinstance(head, bytes) else head.encode("utf-8", "surrogatepass")
    h += b" "*(-len(h) % 8)
    return struct.pack("<Q", len(h)) + h + data


TYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 F4 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 C64 X".split()


def tensors(rng, b):
    "Lies in the table of a safetensors file: types, shapes, offsets, names."
    head, data = open_st(b); ks = [k for k in head if k != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        k = rng.choice(ks); t = head.get(k); other = rng.choice(ks)
        if not isinstance(t, dict) or not isinstance(head.get(other), dict): continue
        way = rng.randrange(9)
        if way == 0: t["dtype"] = rng.choice(TYPES)
        elif way == 1: t["shape"] = rng.choice([t["shape"][::-1], t["shape"][:-1], [*t["shape"], 1], [0], [], [2**60, 2**60], [-1], [2**31], [1]*70, [0, 2**62], t["shape"]*2, "x"]) if isinstance(t.get("shape"), list) else 3
        elif way == 2: t["data_offsets"] = rng.choice([[0, 0], [-1, 8], [2**63, 2**64], [8, 0], [0, len(data) + 8], [0], "x", head[other].get("data_offsets")])
        elif way == 3: head[rng.choice([k + "x", "../" + k, k[1:], "", "\ud800", k.upper()])] = head.pop(k); ks = [x for x in head if x != "__metadata__"]
        elif way == 4: del head[k]; ks = [x for x in head if x != "__metadata__"] or [k]
        elif way == 5:                                      # another type of the same size, honestly declared
            same = {"F32": ("I32", "U32"), "F64": ("I64", "U64", "C64"), "BOOL": ("U8", "I8"), "I64": ("F64",), "I32": ("F32",), "U8": ("BOOL", "I8"), "BF16": ("F16", "I16")}
            t["dtype"] = rng.choice(same.get(t.get("dtype"), ("X",)))
        elif way == 6:                                      # values that are not finite, honestly stored
            lo, hi = t["data_offsets"] if isinstance(t.get("data_offsets"), list) and len(t["data_offsets"]) == 2 and all(type(x) is int for x in t["data_offsets"]) else (0, 0)
            if 0 <= lo < hi <= len(data): i = rng.randrange(lo, hi); data = data[:i] + rng.choice((b"\xff"*8, b"\x7f\xf8"*4, bytes(8), b"\0\0\xc0\x7f"*2))[:hi - i] + data[min(hi, i + 8):]
        elif way == 7: head[k], head[other] = head[other], t
        else: head[k] = rng.choice(EVIL[:-1])
    return shut_st(dump(rng, head), data)


def meta(rng, b):
    "Lies in the JSON header that curvtools puts into a safetensors file; its checksum is taken out, as a forger would."
    head, data = open_st(b); m = head["__metadata__"]; m.pop("crc32", None)
    x = tree(rng, json.loads(m["meta"]))
    m["meta"] = dump(rng, x) if rng.random() < .95 else rng.choice(["", "null", "[]", "{", "NaN", "["*100_000, "1"*5000])
    if rng.random() < .03: m["kind"] = rng.choice(["", "curvtools.basis/2", "x\ud800"])
    return shut_st(json.dumps(head).encode("utf-8", "surrogatepass"), data)


def unsigned(b):
    "The same file without its checksum, so that lies about tensors reach the checks behind it."
    head, data = open_st(b); head["__metadata__"].pop("crc32", None)
    return shut_st(json.dumps(head), data)


def safetensors(rng, b):
    "Any of these."
    way = rng.random()
    return raw(rng, b) if way < .35 else tensors(rng, unsigned(b)) if way < .6 else meta(rng, b)


def as_json(rng, b):
    "Bytes of a JSON file, changed as a tree or as bytes."
    return raw(rng, b) if rng.random() < .3 else dump(rng, tree(rng, json.loads(b))).encode("utf-8", "surrogatepass")


def as_lines(rng, b):
    "Bytes of a file with one JSON object a line."
    if rng.random() < .3: return raw(rng, b)
    rows = b.decode().splitlines()
    for i in rng.sample(range(len(rows)), min(len(rows), rng.choice((1, 1, 2)))): rows[i] = dump(rng, tree(rng, json.loads(rows[i])))
    return "\n".join(rows).encode("utf-8", "surrogatepass")


class Hang(BaseException): "It took too long."


@contextlib.contextmanager
def guard(memory=2**30):
    "No more than so much memory on top of what there is."
    with open("/proc/self/statm") as f: now = int(f.read().split()[0])*resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, old[1]))
    def strike(*_): raise Hang("it took too long")
    before = signal.signal(signal.SIGALRM, strike)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)


@contextlib.contextmanager
def within(seconds):
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
