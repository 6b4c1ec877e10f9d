"""Files of torch.save: their tensors as safetensors stores them, out of every wrapper, and nothing in them run."""

from __future__ import annotations

import argparse
import contextlib
import enum
import hashlib
import json
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from base64 import b85decode
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any
from zlib import decompress

import numpy as np
import pytest
import torch
from conftest import Outcome, State, contents, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn, serialization

from codebook_tools.checkpoints import tensors
from codebook_tools.checkpoints.layout import CONFIG
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
from codebook_tools.errors import CodebookError

STATE: State = {
    "quantize.embedding.weight": torch.linspace(-1, 1, 12).reshape(4, 3),
    "encoder.bias": torch.linspace(0, 1, 3).half(),
}
OTHER: State = {name: tensor + 1 for name, tensor in STATE.items()}
OPTIMISER = {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


def saved(found: object, path: Path, zipped: bool = True) -> Path:
    torch.save(found, path, _use_new_zipfile_serialization=zipped)
    return path


def write(original: Checkpoint, output: Path, config: bytes | None = None, **changed: Tensor) -> State:
    """What the library reads of a written checkpoint."""
    write_checkpoint(original, output, changed, {"kept": "surgery"}, {}, config)
    return load_file(output)


# --- out of the wrappers -------------------------------------------------------------------------------------------

WRAPPED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bare": (STATE, ()),
    "ordered": (OrderedDict(STATE), ()),
    "state_dict": ({"state_dict": STATE, "epoch": 3}, ("epoch",)),
    "lightning": (
        {"epoch": 3, "state_dict": STATE, "optimizer_states": [OPTIMISER], "hyper_parameters": {"lr": 1e-4, "x": {}}},
        ("epoch", "optimizer_states", "hyper_parameters"),
    ),
    "beside an optimiser": ({"model_state_dict": STATE, "optimizer_state_dict": OPTIMISER, "loss": torch.tensor(0.5)},
                            ("optimizer_state_dict", "loss")),
    "beside a discriminator": ({"discriminator": OTHER, "generator": STATE}, ("discriminator",)),
    "beside its average": ({"ema": OTHER, "model": STATE, "args": None}, ("ema", "args")),
    "averaged": ({"params": OTHER, "params_ema": STATE}, ("params",)),
    "twice": ({"model": {"module": STATE, "step": 7}, "cfg": "x"}, ("cfg", "model.step")),
    "under a name of its own": ({"vqvae": STATE, "loss": torch.tensor(0.5), "epoch": 3}, ("loss", "epoch")),
    "with other things inside": ({**STATE, "step": 7, 4: torch.ones(2), "extra": {"a": 1}}, ("step", "4", "extra")),
    "numbers alone": ({"model": {"a": torch.tensor(1.0)}}, ()),
    "a mapping with a default": (defaultdict(None, STATE), ()),
    "in a mapping with a default": (defaultdict(dict, model=STATE, epoch=3), ("epoch",)),
    "attributes": (argparse.Namespace(state_dict=STATE, epoch=3), ("epoch",)),
    "in attributes": ({"run": argparse.Namespace(model=OrderedDict(STATE), lr=1), "x": None}, ("x", "run.lr")),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", WRAPPED)
def test_the_state_dict_is_found_in_its_wrappers(kind: str, zipped: bool, tmp_path: Path) -> None:
    found, left_behind = WRAPPED[kind]
    read = read_checkpoint(saved(found, tmp_path / "model.pt", zipped))
    expected = STATE if kind != "numbers alone" else found["model"]
    assert read.entries.keys() == expected.keys() and read.left_behind == left_behind
    assert all(same(read.tensor(key), tensor) for key, tensor in expected.items())


def test_it_is_as_good_as_a_safetensors_file(tmp_path: Path) -> None:
    path = saved({"model": STATE, "epoch": 1}, tmp_path / "model.ckpt")
    before = path.read_bytes()
    read = read_checkpoint(path)
    assert read.shapes == {"quantize.embedding.weight": (4, 3), "encoder.bias": (3,)}
    assert read.dtypes == {"quantize.embedding.weight": "F32", "encoder.bias": "F16"}
    assert (read.metadata, read.path, read.files, read.folder, read.config_path) == ({}, path, (path,), None, None)
    assert read.sha256 == hashlib.sha256(before).hexdigest()
    assert read.nbytes == 12 * 4 + 3 * 2  # of its tensors alone: an optimiser's state does not count
    read.tensor("encoder.bias").zero_()
    assert same(read.tensor("encoder.bias"), STATE["encoder.bias"])  # each is a copy of its own
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "model.bin", "model.pth.tar", "model"])
def test_a_pickle_is_told_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    assert read_checkpoint(saved(STATE, tmp_path / name)).shapes["encoder.bias"] == (3,)


# --- harmless objects beside the tensors ----------------------------------------------------------------------------


class Mode(enum.Enum):
    """An enum of someone's own config."""

    FAST = 1
    SLOW = ("slow", 0.5)


class Level(enum.IntEnum):
    LOW = 0


class Named(enum.Enum):
    """Pickled by name, as all were in some versions of Python."""

    A = "a"
    __reduce_ex__ = enum.pickle_by_enum_name


OMEGACONF = (
    "c-n<kO;glB5ZwiKfdLdyK>=ArKvq7gym+<z!m`lS0xff~Qj_fLc62tgolMj{P$dT`_?uq+6ZT93vYSvIfKI2U-|N>e!_OgKbwr!{Ds1gG17D",
    "jUXtNg-K2Jj|)sL}!wCRkON+q`=G;eav@$x~B$AVG0=0PZ;w^<3p;rcP18>4fPXt}!A6*%J4pCD|rr(us_#hIX&%KIXGoxZR7-AI|o-Hb`b!",
    "gf(z9jK5?96fc0>G`YZ;aJ0|P}q{Z9pm_s!_FVvNGXl%%(-UqV<o?d$o07o0w;W5Nl7TwE@n;9;)&E|e1?<0>v~Bbbr8BPOLJ4d4lF+5r7W*",
    "O#hIjpkfI~PjQVw`B%U*BRO<4G(m36)$6Ojko97u)V}ueN)f6~;Nx+a2F?$&%od!kB%2qXl1VT3B?9|@V!w>sq8y>!S_sIsaRNwJNVs|6xxM",
    "eaZ;ak%aZ$fTm|2B2YK*9*zgev`vp1~N*!uS!eGnjx$AOR8&rXfXlztIZjsP2YI+fBrYhx1^Za+~@L!EoAdkjY`<F}y<<cT$Y`eheU8!OCc`",
    "z{oX3&1HlOIkEPn;`%}@g3LzfTVKl*F<d0X#T0R&V5-|N_v*>Q<KKUlp6}2+#!eych!~eHp~@gW|2W=InAwsBzS}o&=5ABMpxQ@9+MH#vG&p",
    "yEp`s4B4A=XzNf`Kck+qEU%;%gahdLtk0#%?!64WgCeyKo$yD;aJX>N`yiN`Y$H20*ydv>j>MN^tvf~JJ2bgFx~ZPsX;%ja~DU?oTRHGLRu5",
    "n0A~e}MBcwO&qJuM}`zg}ME5;*s@|%!NGc;aU!ZZki%RDo|~}=qWW{D{?wDAEvg(e=5ZFT-RqxNx{SaInbjrh8r}=MmouQG1w_#nQzP9tq<~",
    "OJuTw@Vwoa_n*_F*f;}h(^IhX4KV~Adma<cF&t5r_Q?o}W2N|C(*MRjLpZAn5qGQTs;Mw;K9}<&?DU<pYOfC+nIQU^tSs(tezk8O3i4xozyu",
    "3b!ba`hSaJyd=)fExfDq?M+11&o2+_Cl$BUjZ<P7bUA47n{LXD@E*PX8qIS=>)`2ClYdqhPS@)I4UyOhzeM8h5U0V@$YHEKtL`d-pHVS6!C",
)
"""A structured config of omegaconf 2.3.0, pickled: nodes of every type, of classes and an enum in `project.config`."""

HARMLESS: dict[str, object] = {
    "arguments": argparse.Namespace(lr=1e-4, sizes=[64, 64], nested=argparse.Namespace(k=4)),
    "ordered": OrderedDict(a=1),
    "defaults": defaultdict(list, {"loss": [1.0], 3: []}),
    "defaults of defaults": defaultdict(None, a=defaultdict(int, b=2)),
    "paths": [Path("a/b"), PurePosixPath("/c"), PureWindowsPath("d")],
    "scalars": [np.float64(3), np.int32(4), np.bool_(True), np.float16(0.5), np.str_("a"), np.complex64(1j)],
    "enums": [Mode.FAST, Mode.SLOW, Mode.FAST, Level.LOW],
    "enums by name": {Named.A: "value"},
    "classes by name": {"mode": Mode, "of": [int, Mode]},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_object_is_read_past(kind: str, zipped: bool, tmp_path: Path) -> None:
    read = read_checkpoint(saved({kind: HARMLESS[kind], "model": STATE}, tmp_path / "model.pt", zipped))
    assert read.left_behind == (kind,)
    assert read.entries.keys() == STATE.keys() and all(same(read.tensor(key), STATE[key]) for key in STATE)


def spliced(fragment: bytes, path: Path, zipped: bool = True) -> Path:
    """A file of torch.save with one more entry, "x", whose value is what the opcodes of the fragment leave."""

    def with_entry(pickled: bytes) -> bytes:
        assert pickled.endswith(b".")
        return pickled[:-1] + text("x") + fragment + b"s."

    content = saved({"model": STATE}, path, zipped).read_bytes()
    if not zipped:
        stream = BytesIO(content)
        for _ in range(4):  # magic number, version, system, object
            [*pickletools.genops(stream)]
        path.write_bytes(with_entry(content[: stream.tell()]) + content[stream.tell() :])
        return path
    with zipfile.ZipFile(BytesIO(content)) as archive, zipfile.ZipFile(path, "w") as written:
        for name in archive.namelist():
            data = archive.read(name)
            written.writestr(name, with_entry(data) if name.endswith("data.pkl") else data)
    return path


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def ask(name: str) -> bytes:
    """The opcode for a class or function."""
    module, _, own = name.rpartition(".")
    return f"c{module}\n{own}\n".encode()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_config_of_omegaconf_is_read_past(zipped: bool, tmp_path: Path) -> None:
    pickled = decompress(b85decode("".join(OMEGACONF)))
    read = read_checkpoint(spliced(pickled[2:-1], tmp_path / "model.pt", zipped))  # without protocol and stop
    assert read.left_behind == ("x",) and read.entries.keys() == STATE.keys()
    assert not {"omegaconf", "project", "project.config"} & sys.modules.keys()


def test_the_module_of_an_enum_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_config.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as patch:
        module = ModuleType("own_config")
        patch.setitem(sys.modules, "own_config", module)
        module.__dict__["Kind"] = kind = enum.Enum("Kind", "A B", module="own_config")
        path = saved({"model": STATE, kind.B: 1}, tmp_path / "model.pt")
    assert read_checkpoint(path).left_behind == ("own_config.Kind(2)",)
    assert "own_config" not in sys.modules and not (tmp_path / "mark").exists()


class Loud:
    """A class that a process allows torch to load."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("it was run")


def test_what_the_process_allows_is_not_used_and_stays_allowed(tmp_path: Path) -> None:
    allows = [Loud, (Loud, "argparse.Namespace")]
    path = saved({"model": STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "model.pt")
    loud = saved({"model": STATE, "x": Loud()}, tmp_path / "loud.pt")
    with serialization.safe_globals(allows):
        before = {*serialization.get_safe_globals()}
        assert read_checkpoint(path).left_behind == ("args",)
        with pytest.raises(CodebookError, match=r"wants \w+\.Loud, more"):
            read_checkpoint(loud)
        assert {*serialization.get_safe_globals()} == before >= {*allows}


def test_threads_read_at_once_and_leave_nothing_allowed(tmp_path: Path) -> None:
    before = {*serialization.get_safe_globals()}
    paths = [
        saved({"model": STATE, kind: value}, tmp_path / f"{kind}.pt", zipped)
        for kind, value in HARMLESS.items()
        for zipped in (True, False)
    ]
    with ThreadPoolExecutor(8) as pool:
        read = [*pool.map(read_checkpoint, paths * 4)]
    assert {one.path.stem for one in read} == {one.left_behind[0] for one in read} == HARMLESS.keys()
    assert {*serialization.get_safe_globals()} == before


# --- written as safetensors ----------------------------------------------------------------------------------------


def test_it_is_written_as_the_library_reads_it(tmp_path: Path) -> None:
    new = torch.linspace(0, 1, 6).reshape(2, 3)
    read = read_checkpoint(saved({"model": STATE, "epoch": 1}, tmp_path / "model.pt"))
    written = write(read, tmp_path / "out.safetensors", **{"quantize.embedding.weight": new})
    assert written.keys() == STATE.keys()
    assert same(written["quantize.embedding.weight"], new) and same(written["encoder.bias"], STATE["encoder.bias"])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "codebook_tools.kept": "surgery"}


@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_shared_turned_and_strided_tensors_are_written_in_full(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "one": base,
        "tied": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": nn.Parameter(base),
        "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        "nothing": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
    }
    read = read_checkpoint(saved(state, tmp_path / "model.pt"))
    assert read.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    written = write(read, tmp_path / "out.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], tensor.detach()) for key, tensor in state.items())
    assert all(tensor.is_contiguous() and read.tensor(key).is_contiguous() for key, tensor in written.items())


def test_all_dtypes_are_kept_and_every_tensor_starts_where_its_numbers_may(tmp_path: Path) -> None:
    names = ["uint8", "float64", "bool", "float32", "float8_e4m3fn", "bfloat16", "int64", "float16", "float8_e5m2"]
    state = {
        name: torch.tensor([0.0, 1.0, 2.0]).to(getattr(torch, name))
        for name in [*names, "complex64", "int8", "int16", "int32", "uint16", "uint32", "uint64"]
    }
    read = read_checkpoint(saved(state, tmp_path / "model.pt"))
    written = write(read, tmp_path / "out.safetensors")
    assert all(same(written[name], tensor) and same(read.tensor(name), tensor) for name, tensor in state.items())
    starts = {entry.key: entry.start for entry in read_checkpoint(tmp_path / "out.safetensors").entries.values()}
    first = min(starts.values())
    assert all((starts[name] - first) % tensor.element_size() == 0 for name, tensor in state.items())


# --- a directory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_directory_of_a_pickle_is_written_under_the_name_that_its_library_loads(
    name: str, written: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    saved(STATE, folder / name)
    saved({"lr": 1}, folder / "training_args.bin")
    (folder / CONFIG).write_text('{"k": 4}')
    (folder / "README.md").write_text("by others")
    before = contents(folder)
    read = read_checkpoint(folder)
    assert (read.path, read.folder, read.config) == (folder / name, folder, {"k": 4})
    write_checkpoint(read, tmp_path / "out", {}, {"kept": "surgery"}, {}, b'{"k": 4}')
    assert {path.name for path in (tmp_path / "out").iterdir()} == {written, CONFIG, "README.md"}
    assert load_file(tmp_path / "out" / written).keys() == STATE.keys()
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"model_type": "encodec"}, "model.safetensors"),
        ({"_class_name": "VQModel"}, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_config_beside_a_pickle_says_under_which_name(config: dict[str, str], written: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(config))
    read = read_checkpoint(saved(STATE, tmp_path / "vq.pt"))
    write_checkpoint(read, tmp_path / "out", {}, {}, {}, json.dumps(config).encode())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {written, CONFIG}


def test_safetensors_come_before_a_pickle_in_one_directory(tmp_path: Path) -> None:
    write(read_checkpoint(saved(STATE, tmp_path / "pytorch_model.bin")), tmp_path / "model.safetensors")
    (tmp_path / CONFIG).write_text("{}")
    assert read_checkpoint(tmp_path).path.name == "model.safetensors"


def test_a_pickle_in_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CodebookError, match=r"holds pytorch_model.bin in shards"):
        read_checkpoint(tmp_path)


# --- what is refused -----------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark where its pickle is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (self.mark,)


@dataclass
class Options:
    """A config of someone's own."""

    k: int

    class Kind(enum.Enum):
        A = 1


class Odd(enum.Enum):
    LIST = [1]  # noqa: RUF012


class Whole(nn.Linear):
    """A model that someone saved whole."""


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an array of numpy": (lambda mark: {"model": STATE, "x": np.ones(3)}, r"wants numpy\.\S*_reconstruct, more"),
    "a config that is an object": (lambda mark: {"model": STATE, "x": Options(3)}, r"wants \w+\.Options, more"),
    "an enum in a class": (lambda mark: {"model": STATE, "x": Options.Kind.A}, r"wants \w+\.Options, more"),
    "an enum of objects": (lambda mark: {"model": STATE, "x": Odd.LIST}, r"wants \w+\.Odd, more"),
    "a function": (lambda mark: {"model": STATE, "x": saved}, r"wants \w+\.saved, more"),
    "a model saved whole": (lambda mark: Whole(2, 2), r"wants \S*test_pickles\.Whole, more"),
    "a command": (lambda mark: {"model": STATE, "x": Bomb(mark)}, r"wants \w+\.mkdir, more"),
    "no tensors": (lambda mark: {"epoch": 3}, "holds no tensors by name"),
    "one tensor": (lambda mark: torch.ones(3), "holds no tensors by name"),
    "a list": (lambda mark: [STATE], "holds no tensors by name"),
    "an optimiser": (lambda mark: OPTIMISER, "holds no tensors by name"),
    "two models": (lambda mark: {"encoder": STATE, "decoder": OTHER}, r"2 state dicts \(encoder, decoder\), none"),
    "sparse": (lambda mark: {"a": torch.eye(3).to_sparse()}, "a in .* is sparse_coo of float32 on cpu, which"),
    "no numbers": (lambda mark: {"a": torch.ones(3, device="meta")}, "a in .* is strided of float32 on meta, which"),
    "double complex": (lambda mark: {"a": torch.ones(3, dtype=torch.complex128)}, "a in .* of complex128 on cpu"),
    "quantised": (lambda mark: {"a": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)}, "of qint8 on"),
    "repeated": (lambda mark: STATE | {"a": torch.zeros(1).expand(10**5, 10**5)}, "a in .* repeats 4 bytes to 40,0"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_or_less_than_tensors_is_refused_in_one_line(kind: str, zipped: bool, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    saved(make(mark), path, zipped)
    with pytest.raises(CodebookError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not mark.exists()


def test_a_command_would_have_been_run(tmp_path: Path) -> None:
    """The refusals above are worth something: the same file leaves its mark where a pickle is believed."""
    torch.load(saved(Bomb(tmp_path / "mark"), tmp_path / "model.pt"), weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_no_torch_at_all_is_never_run(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), protocol))
    with pytest.raises(CodebookError) as error:
        read_checkpoint(tmp_path / "model.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists()


OWN, ONE = ask("project.config.Mode"), b"K\x01"
CLASS, OBJECT = ask("omegaconf.nodes.AnyNode"), ask("omegaconf.nodes.AnyNode") + b")\x81"
TRICKS = b"}(" + b"".join(
    text(name) + ask("collections.OrderedDict")
    for name in ("__class__", "__dict__", "__setstate__", "__reduce__", "__del__", "__repr__", "__hash__", "state")
) + b"u"  # fmt: skip
"""A state that would change what an object is, and what becomes of it, were it written to the object."""

INERT: dict[str, bytes] = {
    "attributes of an object": OBJECT + TRICKS + b"b",
    "slots of an object": OBJECT + b"N" + TRICKS + b"\x86b",
    "a class as a state": OBJECT + CLASS + b"b",
    "an object that is its own state": ask("pathlib.PosixPath") + b")Rq\xf0h\xf0b",
    "arguments of any kind": ask("numpy.dtype") + CLASS + ask("collections.OrderedDict") + b"N\x87R",
    "objects in a scalar": ask("numpy.core.multiarray.scalar") + ask("numpy.dtype") + text("O") + b"\x85R" + b"N\x86R",
    "attributes of arguments": ask("argparse.Namespace") + b")\x81" + TRICKS + b"b",
    "a member of an enum that is named like a method": ask("builtins.getattr") + OWN + text("__reduce__") + b"\x86R",
    "a wrapped object": ask("torch._tensor._rebuild_from_type_v2") + b"(" + CLASS + CLASS + b")" + TRICKS + b"tR",
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", INERT)
def test_nothing_that_is_written_to_a_stand_in_is_believed(kind: str, zipped: bool, tmp_path: Path) -> None:
    read = read_checkpoint(spliced(INERT[kind], tmp_path / "model.pt", zipped))
    assert read.left_behind == ("x",) and all(same(read.tensor(key), STATE[key]) for key in STATE)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "getattr of a class of torch": (ask("builtins.getattr") + ask("torch.Tensor") + text("data") + b"\x86R", "getattr"),
    "getattr of a stand-in": (ask("builtins.getattr") + CLASS + text("state") + b"\x86R", "getattr"),
    "getattr of an object": (ask("builtins.getattr") + OBJECT + text("state") + b"\x86R", "getattr"),
    "getattr by no name": (ask("builtins.getattr") + OWN + text("A\n") + b"\x86R", "getattr"),
    "getattr that was built": (ask("__builtin__.getattr") + OWN + ONE + b"\x86\x81", r"project\.config\.Mode"),
    "an enum called with a class": (OWN + ask("collections.OrderedDict") + b"\x85R", r"project\.config\.Mode"),
    "an enum called with an object": (OWN + OBJECT + b"\x85R", r"project\.config\.Mode"),
    "an enum called with two": (OWN + ONE + ONE + b"\x86R", r"project\.config\.Mode"),
    "an object of an own class": (OWN + b")\x81", r"project\.config\.Mode"),
    "an own class with a state": (OWN + ONE + b"\x85\x81" + TRICKS + b"b", r"project\.config\.Mode"),
    "a member that is called": (OWN + ONE + b"\x85R" + ONE + b"\x85R", r"project\.config\.Mode"),
    "a function of its own": (ask("project.config.run") + text("touch") + b"\x85R", r"project\.config\.run"),
    "arguments with arguments": (ask("argparse.Namespace") + ONE + b"\x85R", r"argparse\.Namespace"),
    "arguments with another state": (ask("argparse.Namespace") + b")\x81" + ONE + b"b", r"argparse\.Namespace"),
    "a type that is called": (ask("builtins.int") + ONE + b"\x85R", r"builtins\.int"),
    "a hint of a class": (ask("_operator.getitem") + CLASS + ONE + b"\x86R", r"operator\.getitem"),
    "a class of the library": (ask("subprocess.Popen") + text("touch") + b"\x85R", r"subprocess\.Popen"),
    "a class of torch": (ask("torch.package.PackageImporter") + text("a") + b"\x85R", r"torch\.\w+\.PackageImporter"),
    "a class of numpy": (ask("numpy.lib.npyio.NpzFile") + text("a") + b"\x85R", r"numpy\.lib\.npyio\.NpzFile"),
    "a class of this": (ask("codebook_tools.errors.CodebookError") + ONE + b"\x85R", r"codebook_tools\.errors\.Co\w+"),
    "too many enums": (b"](" + b"".join(ask(f"project.E{i}") for i in range(65)) + b"e", r"project\.E0"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_another_use_of_an_allowed_name_is_refused(kind: str, zipped: bool, tmp_path: Path) -> None:
    fragment, name = HOSTILE[kind]
    with pytest.raises(CodebookError, match=rf"wants (builtins\.)?{name}, more than tensors") as error:
        read_checkpoint(spliced(fragment, tmp_path / "model.pt", zipped))
    assert "\n" not in str(error.value)


COMMANDS = ("posix.system", "os.system", "subprocess.Popen", "builtins.exec", "builtins.eval", "__builtin__.eval")


def command(name: str, mark: Path) -> bytes:
    """Called with one text, as enums are."""
    word = f"open({str(mark)!r}, 'w')" if name.endswith(("exec", "eval")) else f"touch {mark}"
    return ask(name) + (b"](" + text("touch") + text(str(mark)) + b"e" if "Popen" in name else text(word)) + b"\x85R"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_in_the_form_of_an_enum_is_refused_by_name(name: str, zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for before in (b"", b"](" + OWN + ONE + b"\x85R"):  # alone, and beside an enum
        fragment = before + command(name, mark) + (b"e" if before else b"")
        with pytest.raises(CodebookError, match=rf"wants (\w+\.)?{name.partition('.')[2]}, more"):
            read_checkpoint(spliced(fragment, tmp_path / "model.pt", zipped))
        assert not mark.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_such_a_command_would_have_been_run(name: str, tmp_path: Path) -> None:
    made = pickle.loads(b"\x80\x02" + command(name, tmp_path / "mark") + b".")
    if isinstance(made, subprocess.Popen):
        made.wait()
    assert (tmp_path / "mark").exists()


ASKED = (
    *("argparse.Namespace", "builtins.dict", "builtins.getattr", "collections.OrderedDict", "collections.defaultdict"),
    *("numpy.dtype", "omegaconf.nodes.AnyNode", "pathlib.PosixPath", "project.config.Mode", "typing.List"),
    *("_operator.getitem", "torch.FloatStorage", "torch.Tensor", "torch._tensor._rebuild_from_type_v2"),
    *("torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_tensor_v2", "torch.nn.parameter.Parameter"),
)
USES = ("R", "\x81", "b")
"""Call, make an object, give it a state."""


def values(mark: Path) -> st.SearchStrategy[bytes]:
    """Opcodes that leave one value: allowed names and commands, used in every way and put into each other."""
    leaves = [*map(ask, ASKED), *(command(name, mark) for name in COMMANDS), TRICKS, text("__class__"), ONE, b"N", b")"]
    return st.recursive(
        st.sampled_from(leaves),
        lambda inner: st.one_of(
            st.builds(lambda use, one, other: one + other + use.encode("latin1"), st.sampled_from(USES), inner, inner),
            st.builds(lambda items: b"(" + b"".join(items) + b"t", st.lists(inner, max_size=4)),
            st.builds(lambda items: b"](" + b"".join(items) + b"e", st.lists(inner, max_size=2)),
            st.builds(lambda key, value: b"}" + key + value + b"s", inner, inner),
        ),
        max_leaves=12,
    )


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_no_pickle_runs_anything(data: st.DataObject, zipped: bool, tmp_path: Path) -> None:
    mark, before = tmp_path / "mark", {*serialization.get_safe_globals()}
    path = spliced(data.draw(values(mark)), tmp_path / "model.pt", zipped)
    with contextlib.suppress(CodebookError):
        read_checkpoint(path).tensors()
    assert not mark.exists() and {*serialization.get_safe_globals()} == before


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(CodebookError, match=r"is a TorchScript program, which is not run; save"):
        read_checkpoint(tmp_path / "model.pt")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject, zipped: bool, tmp_path: Path) -> None:
    content = bytearray(saved({"model": STATE}, tmp_path / "model.pt", zipped).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(2, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.pt").write_bytes(content)
    with contextlib.suppress(CodebookError):
        read_checkpoint(tmp_path / "model.pt").tensors()


def test_a_mapping_within_itself_has_an_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"w": torch.ones(3)}
    endless["model"] = endless
    with pytest.raises(CodebookError, match="holds no tensors by name"):
        read_checkpoint(saved(endless, tmp_path / "model.pt"))


def test_a_mapping_under_many_names_is_searched_once(tmp_path: Path) -> None:
    """A file of 25 KB whose mappings hold each other would be searched for years."""
    shared: dict[str, object] = {"a": 1}
    for _ in range(5):
        shared = {str(i): shared for i in range(300)}
    with pytest.raises(CodebookError, match="holds no tensors by name"):
        read_checkpoint(saved(shared, tmp_path / "model.pt"))


def test_the_attributes_of_a_parameter_are_not_taken_for_its_methods(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    for name in ("numel", "detach", "element_size", "resolve_conj"):
        setattr(parameter, name, torch.device)
    assert read_checkpoint(saved({"a": parameter}, tmp_path / "model.pt")).tensor("a").tolist() == [1, 1]


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    """A file of 80 MB opens without as much memory; only what is asked for is read."""
    state = {"codebook": torch.ones(4, 3), "large": torch.zeros(20_000_000)}
    program = """
import sys
from pathlib import Path
import torch
from codebook_tools.checkpoints.read import read_checkpoint
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
before = peak()
assert read_checkpoint(Path(sys.argv[1])).tensor("codebook").sum() == 12
print(peak() - before)
"""
    path = saved(state, tmp_path / "model.pt")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    path.unlink()
    assert int(done.stdout) < 40


# --- through the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_operated_on_as_its_safetensors_twin(
    wrapped: bool, tiny: Path, codebook: Callable[..., Outcome], images_folder: Path, tmp_path: Path
) -> None:
    state = load_file(tiny)
    path = saved({"args": argparse.Namespace(k=4), "state_dict": state} if wrapped else state, tmp_path / "twin.pth")
    found = {}
    for model in (tiny, path):
        done = codebook("prune", model, "--data", images_folder, "--input-range", "-1,1", "--json")
        assert done.exit_code == 0, done.stderr
        found[model] = done.json
        written = Path(done.json["outputs"]["model"])
        assert written.suffix == ".safetensors"
        assert codebook("verify", written, "--against", model).exit_code == 0
    assert found[path]["stages"] == found[tiny]["stages"]
    pruned = [load_file(found[model]["outputs"]["model"]) for model in (tiny, path)]
    assert pruned[0].keys() == pruned[1].keys()
    assert all(same(pruned[0][key], pruned[1][key]) for key in pruned[0])


def test_a_warning_is_one_line_whatever_names_are_in_it(
    codebook: Callable[..., Outcome], tiny: Path, tmp_path: Path, images_folder: Path
) -> None:
    path = saved({"state_dict": load_file(tiny), "a\nerror: \x1b[31mall is lost": 1}, tmp_path / "model.pt")
    found = codebook("measure", path, "--data", images_folder, "--input-range", "-1,1")
    assert found.exit_code == 0 and r"; a\nerror: \x1b[31mall is lost is left behind" in found.stderr
    assert all(line.startswith("warning: ") for line in found.stderr.splitlines())
