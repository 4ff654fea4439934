"""Hostile files: what each does, and the expected error.

`python -m tests.checkpoint.hostile FOLDER` reads all files of a folder with little memory to spare, and prints for each
a line of JSON: how it ended. A number after FOLDER says how many bytes. It is a process of its own, for files may
end it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOM = 600 * 2**20  # bytes of address space beyond what the libraries take
SECONDS = 60  # for one file; none takes more than one or two

LOADS = "loads"
MORE = "references names outside the allowlist"
UNSAFE = "cannot be read safely"
DAMAGED = "truncated or damaged"

# ---- a pickle's instructions, one by one ----

START = b"\x80\x02"


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def pair(values: Any) -> bytes:
    return b"(" + b"".join(number(value) if isinstance(value, int) else value for value in values) + b"t"


def call(path: str, *arguments: bytes) -> bytes:
    return name(path) + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", count: int = 4, kind: str = "torch.FloatStorage", more: bytes = b"") -> bytes:
    return b"(" + text("storage") + name(kind) + text(key) + text("cpu") + number(count) + more + b"tQ"


def tensor(size: Any = (4,), stride: Any = (1,), offset: int = 0, of: bytes | None = None) -> bytes:
    parts = (storage() if of is None else of, number(offset), pair(size), pair(stride), b"\x89", b"}")
    return call("torch._utils._rebuild_tensor_v2", *parts)


def state(**items: bytes) -> bytes:
    return START + b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


def beside(value: bytes, key: bytes | None = None) -> bytes:
    """A weight as it should be, and something else under another key."""
    return START + b"}(" + text("w") + tensor() + (text("x") if key is None else key) + value + b"u."


# ---- containers ----

WEIGHT = struct.pack("<4f", 1, 2, 3, 4)


def archive(content: bytes, records: Mapping[str, bytes] | None = None, packed: bool = False) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", content)
        for key, value in (records or {"archive/data/0": WEIGHT}).items():
            file.writestr(key, value)
    return made.getvalue()


def legacy(content: bytes, keys: bytes, data: bytes) -> bytes:
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + content + START + keys + b"." + data


def safetensors(header: Any, data: bytes = WEIGHT, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- what they do ----


class Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


def attacks() -> dict[str, tuple[bytes, str]]:
    touch = "touch RAN"
    direct = Attack(os.system, (touch,))
    made = {
        "direct": direct,
        "in tuples": {"state_dict": ((((direct,),),),)},
        "as a key": {os.system: 1},
        "chain": Attack(getattr, (Attack(__import__, ("os",)), "system")),
        "with state": Attack(dict, (), direct),
        "with items": Attack(list, (), None, iter([direct])),
        "eval": Attack(eval, ("open('RAN', 'w')",)),
        "copy": Attack(shutil.copy, (__file__, "RAN")),
        "instantiator": {"hyper_parameters": {"_instantiator": os.system, "_class_path": "os.system"}},
    }
    files = {key: (archive(pickle.dumps({"w": 1, "x": value}, 2)), MORE) for key, value in made.items()}
    system = call("builtins.getattr", call("builtins.__import__", text("os")), text("system"))
    files["chained call"] = (archive(beside(system + b"(" + text(touch) + b"tR")), MORE)
    files["instantiator as text"] = (
        archive(beside(b"}(" + text("_instantiator") + text("os.system") + b"u", text("hyper_parameters"))),
        LOADS,
    )
    for opcode, content in {
        "INST": b"(" + text(touch) + b"iposix\nsystem\n",
        "OBJ": b"(" + name("os.system") + text(touch) + b"o",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93",
        "NEWOBJ_EX": name("os.system") + b")}\x92",
        "PERSID": b"Pos.system\n",
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**62),
        "NEXT_BUFFER": b"\x97",
    }.items():
        files[opcode] = (archive(beside(content)), UNSAFE)
    files["plain pickle"] = (pickle.dumps(direct, 2), MORE)
    files["legacy"] = (legacy(state(w=tensor(), x=call("os.system", text(touch))), b"](X\1\0\0\x000e", b""), MORE)
    files["persistent name"] = (archive(beside(b"(" + name("os.system") + text(touch) + b"tQ")), UNSAFE)
    module = b"(" + text("module") + name("os.system") + text(touch) + text("source") + b"tQ"
    files["persistent module"] = (archive(beside(module)), UNSAFE)
    files["storage of a function"] = (archive(state(w=tensor(of=storage(kind="os.system")))), MORE)
    files["build on a name"] = (archive(beside(name("builtins.dict") + b"}(" + text("get") + b"Nub")), LOADS)
    files["build on a dictionary"] = (archive(beside(b"}}(" + text("items") + b"Nub")), LOADS)
    files["call of a text"] = (archive(beside(text("os.system") + b"(" + text(touch) + b"tR")), UNSAFE)
    rebuild = name("torch._tensor._rebuild_from_type_v2")
    files["rebuild by rebuild"] = (archive(beside(rebuild + b"(" + rebuild + b"N)NtR")), UNSAFE)
    files["rebuild by a function"] = (archive(beside(rebuild + b"(" + name("os.system") + b"N)NtR")), MORE)
    files["names for a terminal"] = (archive(beside(name("os.\x1b[2Jsystem"))), MORE)
    files["a thousand names"] = (archive(beside(b"(" + b"".join(name(f"os.f{i}") for i in range(1000)) + b"t")), MORE)
    return files


def bombs() -> dict[str, tuple[bytes, str]]:
    double = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
    nested = b")" + b"\x85" * 300_000
    lists = b"]" * 100_000 + b"a" * 99_999
    great = b"(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, 2000))
    files = {
        "doubled tuples": (beside(b"(" + double + b"t"), LOADS),
        "doubled tuples as a key": (START + b"}(" + double + b"h\x00Nu.", UNSAFE),
        "nested tuples": (beside(nested), LOADS),
        "nested tuples as a key": (START + b"}" + nested + b"Ns.", UNSAFE),
        "nested lists": (beside(lists), LOADS),
        "keys of one hash": (START + b"}" + great + b"u.", UNSAFE),
        "a list as a key": (START + b"}]Ns.", UNSAFE),
        "bytes by the terabyte": (beside(call("builtins.bytearray", number(2**40))), LOADS),
        "a tensor by its size": (beside(call("torch.FloatTensor", number(2**40))), LOADS),
        "a storage by its size": (beside(call("torch.FloatStorage", number(2**40))), LOADS),
        "a text of 4 GB": (START + b"X\xff\xff\xff\xff" + b"a.", UNSAFE),
        "a number of 2 GB": (START + b"\x8b\xff\xff\xff\x7f" + b"a.", UNSAFE),
        "memo of nothing": (START + b"h\x07.", UNSAFE),
        "stack of nothing": (START + b"s.", UNSAFE),
        "marks": (START + b"(" * 100_000 + b".", UNSAFE),
        "no end": (START + b"}" * 1000, UNSAFE),
        "a counter of a counter": (beside(call("collections.Counter", b"](K\x01K\x02e")), UNSAFE),
    }
    zeros = {"archive/data/0": WEIGHT, "archive/x": bytes(80 * 2**20)}
    return {key: (archive(content), expected) for key, (content, expected) in files.items()} | {
        "a text of 4 GB, legacy": (START + b"X\xff\xff\xff\xff" + b"a.", UNSAFE),
        "zeros": (archive(state(w=tensor()), zeros, True), "zip bomb"),
    }


def tensors() -> dict[str, tuple[bytes, str]]:
    files = {
        "stride 0": tensor((2**40,), (0,)),
        "stride 0, many axes": tensor((2**20,) * 8, (0,) * 8),
        "beyond its storage": tensor((5,)),
        "far beyond": tensor((2,), (2**61,)),
        "offset out of range": tensor((1,), (1,), 4),
        "sizes without end, and none": tensor((2**61, 2**61, 0), (1, 1, 1)),
        "huge offset": tensor((4,), (1,), 2**61),
    }
    wrong = {
        "negative size": tensor((-4,)),
        "negative stride": tensor((4,), (-1,)),
        "negative offset": tensor((4,), (1,), -1),
        "too many axes": tensor((1,) * 100, (1,) * 100),
        "unlike axes": tensor((2, 2), (1,)),
        "sizes of no number": tensor((b"N",)),
        "sizes that are true": tensor((b"\x88",)),
        "numbers of 2000 bits": tensor((1 << 2000,)),
        "no storage": tensor(of=text("0")),
        "storage of -1": tensor(of=storage(count=-1)),
        "view of a storage": tensor(of=storage(more=b"(" + text("1") + b"K\x00K\x04t")),
        "storage in two ways": tensor() + tensor(of=storage(count=3)) + b"\x86",
    }
    unlike = {
        "storage that is not there": tensor(of=storage("1")),
        "storage elsewhere": tensor(of=storage("../../../etc/passwd")),
        "storage of a terabyte": tensor((2**38,), (1,), of=storage(count=2**38)),
        "storage that is smaller": tensor((2,), of=storage(count=2)),
    }
    made = {key: (archive(state(w=content)), DAMAGED) for key, content in (files | unlike).items()}
    made |= {key: (archive(state(w=content)), UNSAFE) for key, content in wrong.items()}
    keys = b"](X\1\0\0\x000e"
    made["legacy: a terabyte"] = (
        legacy(state(w=tensor((2**38,), of=storage(count=2**38, more=b"N"))), keys, struct.pack("<q", 2**38) + WEIGHT),
        DAMAGED,
    )
    made["legacy: -1"] = (legacy(state(w=tensor(of=storage(more=b"N"))), keys, struct.pack("<q", -1)), DAMAGED)
    made["legacy: no storages"] = (legacy(state(w=tensor(of=storage(more=b"N"))), b"]", b""), DAMAGED)
    made["legacy: other storages"] = (legacy(state(w=tensor(of=storage(more=b"N"))), b"](X\1\0\0\x001e", b""), UNSAFE)
    made["legacy: as it should be"] = (
        legacy(state(w=tensor(of=storage(more=b"N"))), keys, struct.pack("<q", 4) + WEIGHT),
        LOADS,
    )
    return made


def archives() -> dict[str, tuple[bytes, str]]:
    good = archive(state(w=tensor()))
    end = good.rindex(b"PK\x05\x06")
    directory = good.index(b"PK\x01\x02")
    second = good.index(b"PK\x01\x02", directory + 4)

    def patched(at: int, value: bytes) -> bytes:
        return good[:at] + value + good[at + len(value) :]

    weights = {"archive/data/0": WEIGHT}
    made = {
        "as it should be": (good, LOADS),
        "out of its folder": (archive(state(w=tensor()), weights | {"archive/../../x": b""}), "outside of the archive"),
        "absolute": (archive(state(w=tensor()), weights | {"/etc/passwd": b""}), "outside of the archive"),
        "backslashes": (archive(state(w=tensor()), weights | {"..\\x": b""}), "outside of the archive"),
        "two checkpoints": (archive(state(w=tensor()), weights | {"b/data.pkl": b""}), "several"),
        "overlapping": (patched(second + 42, b"\0\0\0\0"), "overlaps|not where|zip directory"),
        "beyond its end": (patched(second + 42, struct.pack("<I", len(good))), DAMAGED),
        "encrypted": (patched(second + 8, b"\x01"), "encrypted"),
        "rarely packed": (patched(second + 10, b"\x0e"), "rare way"),
        "another size": (patched(second + 20, struct.pack("<II", 8, 16)), DAMAGED),
        "longer than it is": (patched(second + 20, struct.pack("<II", 2**30, 2**30)), DAMAGED),
        "a directory of 2 GB": (patched(end + 12, struct.pack("<I", 2**31)), "more entries"),
        "a directory elsewhere": (patched(end + 16, struct.pack("<I", 2**31)), DAMAGED),
        "an end of its own": (good + b"PK\x05\x06" + b"\xff" * 18, DAMAGED + "|more entries"),
        "packed, and another size": (patched_size(), DAMAGED),
    }
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        double = io.BytesIO(good)
        with zipfile.ZipFile(double, "a") as file:
            file.writestr("archive/data/0", bytes(16))
    made["named twice"] = (double.getvalue(), "twice")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("../../tensors"))
    made["tar"] = (tar.getvalue(), "neither a .ckpt")
    return made


def patched_size() -> bytes:
    """A packed entry that becomes more than the directory promises."""
    packed = archive(state(w=tensor()), {"archive/data/0": bytes(2**16)}, packed=True)
    at = packed.index(b"PK\x01\x02", packed.index(b"PK\x01\x02") + 4)
    return packed[: at + 24] + struct.pack("<I", 16) + packed[at + 28 :]


def headers() -> dict[str, tuple[bytes, str]]:
    w = json.dumps(entry())
    many = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(150_000)) + b"}"
    made = {
        "as it should be": (safetensors({"w": entry()}), LOADS),
        "2^63": (safetensors({"w": entry()}, length=2**63), "neither|" + DAMAGED),
        "2^64 - 1": (safetensors({"w": entry()}, length=2**64 - 1), "neither|" + DAMAGED),
        "99 MB": (safetensors({"w": entry()}, length=99_000_000), DAMAGED),
        "named twice": (safetensors(f'{{"w":{w},"w":{w}}}'.encode()), "twice|" + DAMAGED),
        "a field twice": (safetensors(b'{"w":{"dtype":"I32",' + w[1:].encode() + b"}"), "twice|" + DAMAGED),
        "named twice, in escapes": (safetensors(f'{{"w":{w},"\\u0077":{w}}}'.encode()), "twice|" + DAMAGED),
        "overlapping": (safetensors({"v": entry(), "w": entry()}), DAMAGED),
        "with a hole": (safetensors({"w": entry((4,), (16, 32))}, WEIGHT * 2), DAMAGED),
        "rest": (safetensors({"w": entry()}, WEIGHT * 2), DAMAGED),
        "too long": (safetensors({"w": entry((2**40,), (0, 2**42))}), DAMAGED),
        "overflow": (safetensors({"w": entry((2**62, 8), (0, 16))}), DAMAGED),
        "negative": (safetensors({"w": entry((-4,), (-16, 0))}), DAMAGED),
        "backwards": (safetensors({"w": entry((4,), (16, 0))}), DAMAGED),
        "no number": (safetensors(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'), DAMAGED),
        "of no type": (safetensors({"w": entry(dtype="F31")}), DAMAGED),
        "nested": (safetensors(b'{"w":' + b"[" * 1_000_000), DAMAGED),
        "no text": (safetensors(b'{"\xff\xfe":' + w.encode() + b"}"), DAMAGED),
        "many": (safetensors(many, b""), "more than any model"),
        "for a terminal": (safetensors({"\x1b[2J\n": entry()}), "unprintable or very long names"),
        "a name of 1 MB": (safetensors({"w" * 2**20: entry()}), "unprintable or very long names"),
        "metadata": (safetensors({"__metadata__": {"global_step": "9" * 10_000}, "w": entry()}), LOADS),
    }
    tower = "cond_stage_model.transformer."
    short, full = f"{tower}encoder.weight", f"{tower}text_model.encoder.weight"
    two = {short: entry((1,), (0, 4)), full: entry((1,), (4, 8))}
    made["names that meet"] = (safetensors(two, WEIGHT[:8]), "ambiguous")
    made["names that meet, alike"] = (safetensors(two, WEIGHT[:4] * 2), LOADS)
    return made


def names() -> dict[str, tuple[bytes, str]]:
    return {
        "for a terminal": (archive(state(**{"\x1b[2J": tensor()})), "unprintable or very long names"),
        "half a letter": (archive(state(**{"\udcff": tensor()})), "unprintable or very long names"),
        "of entries": (archive(state(**{"\x1b[2J\n": b"N"})), "holds no weights"),
    }


KINDS: Mapping[str, Callable[[], dict[str, tuple[bytes, str]]]] = {
    "attack": attacks,
    "bomb": bombs,
    "tensor": tensors,
    "zip": archives,
    "safetensors": headers,
    "names": names,
}


def corpus() -> dict[str, tuple[bytes, str]]:
    """All files by a name: what is in them, and a pattern of the error, or `LOADS`."""
    return {f"{kind}, {key}": made for kind, make in KINDS.items() for key, made in make().items()}


# ---- reading them ----


def read_all(folder: Path, room: int = ROOM) -> None:
    import resource

    from ldm.checkpoint import CheckpointError, read_checkpoint

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("it took too long"))
    for path in sorted(folder.iterdir()):
        print(json.dumps([path.name, "ended the process"]), flush=True)
        signal.alarm(SECONDS)
        try:
            checkpoint = read_checkpoint(path)
            outcome = LOADS if all(value.sum().isfinite() for value in checkpoint.state.values()) else "not finite"
            del checkpoint
        except CheckpointError as error:
            outcome = str(error)
        except BaseException as error:  # whatever it is, it is a fault to be shown
            outcome = f"raised {type(error).__name__}: {error}"
        print(json.dumps([path.name, outcome]), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(["peak", f"{peak // 1024} MB"]), flush=True)


if __name__ == "__main__":
    read_all(Path(sys.argv[1]), *map(int, sys.argv[2:]))
