"""Files of torch.save: the state dict out of every wrapper, harmless objects read past, and no code in them run."""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, State, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn, serialization
from weight_files import save_pickle

from codebook_tools.checkpoints.layout import CONFIG
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
from codebook_tools.errors import CodebookError

STATE: State = {
    "quantize.embedding.weight": torch.linspace(-1, 1, 12).reshape(4, 3),
    "encoder.bias": torch.linspace(0, 1, 3).half(),
}
OTHER: State = {name: tensor + 1 for name, tensor in STATE.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}

MODEL, MARK = Path("model.pt"), Path("mark")
"""In the folder of a test; the mark is what a file leaves if its code is run."""

both_forms = pytest.mark.parametrize("zipped", [True, False])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused_unrun(path: Path, message: str) -> None:
    with pytest.raises(CodebookError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not MARK.exists()


def assert_read_past(path: Path, left_behind: tuple[str, ...], state: State = STATE) -> None:
    read = read_checkpoint(path)
    assert read.left_behind == left_behind and read.entries.keys() == state.keys()
    assert all(same(read.tensor(key), tensor) for key, tensor in state.items())


WRAPPED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bare": (STATE, ()),
    "ordered": (OrderedDict(STATE), ()),
    "state_dict": ({"state_dict": STATE, "epoch": 3}, ("epoch",)),
    "lightning": ({"epoch": 3, "state_dict": STATE, "optimizer_states": [OPTIMIZER], "hyper_parameters": {"x": {}}},
                  ("epoch", "optimizer_states", "hyper_parameters")),
    "beside an optimizer": ({"model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER, "loss": torch.tensor(0.5)},
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


def test_tensors_of_all_dtypes_and_strides_are_written_in_full() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "tied": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": nn.Parameter(base),
        "channels last": base.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
    }
    names = "uint8 float64 bool float32 float8_e4m3fn bfloat16 int64 float16 float8_e5m2 int8 int16 int32 uint16 uint64"
    state |= {name: torch.tensor([0.0, 1.0, 2.0]).to(getattr(torch, name)) for name in names.split()}
    read = read_checkpoint(save_pickle(state | {"one": base}, MODEL))
    write_checkpoint(read, Path("out.safetensors"), {}, {}, {})
    written = load_file("out.safetensors")
    assert written.keys() == {*state, "one"}
    for name, tensor in state.items():
        assert same(written[name], tensor.detach().resolve_conj()) and same(read.tensor(name), written[name]), name
        assert written[name].is_contiguous() and read.tensor(name).is_contiguous()


def test_safetensors_come_before_a_pickle_and_a_pickle_in_shards_is_refused(tmp_path: Path) -> None:
    Path(CONFIG).write_text("{}")
    Path("pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CodebookError, match=r"holds pytorch_model.bin in shards"):
        read_checkpoint(tmp_path)
    write_checkpoint(read_checkpoint(save_pickle(STATE, MODEL)), Path("model.safetensors"), {}, {}, {})
    assert read_checkpoint(tmp_path).path.name == "model.safetensors"


# --- harmless objects beside the tensors ----------------------------------------------------------------------------
Mode = enum.Enum("Mode", {"FAST": 1, "SLOW": ("slow", 0.5)})
Level = enum.IntEnum("Level", {"LOW": 0})


class Named(enum.Enum):
    """Pickled by name, as all were in some versions of Python."""

    A = "a"
    __reduce_ex__ = enum.pickle_by_enum_name


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
READ: dict[str, tuple[Any, tuple[str, ...]]] = dict(WRAPPED)
READ |= {kind: ({kind: content, "model": STATE}, (kind,)) for kind, content in HARMLESS.items()}


@both_forms
@pytest.mark.parametrize("kind", READ)
def test_the_state_dict_is_found_in_wrappers_and_beside_harmless_objects(kind: str, zipped: bool) -> None:
    content, left_behind = READ[kind]
    state = content["model"] if kind == "numbers alone" else STATE
    assert_read_past(save_pickle(content, MODEL, zipped), left_behind, state)


def spliced(fragment: bytes, path: Path, zipped: bool = True) -> Path:
    """A file of torch.save with one more entry, "x", whose value is what the opcodes of the fragment leave."""

    def with_entry(pickled: bytes) -> bytes:
        assert pickled.endswith(b".")
        return pickled[:-1] + text("x") + fragment + b"s."

    content = save_pickle({"model": STATE}, path, zipped).read_bytes()
    if not zipped:
        stream = BytesIO(content)
        for _ in range(4):  # magic number, version, system, object
            [*pickletools.genops(stream)]
        path.write_bytes(with_entry(content[: stream.tell()]) + content[stream.tell() :])
        return path
    with zipfile.ZipFile(BytesIO(content)) as archive, zipfile.ZipFile(path, "w") as written:
        for name in archive.namelist():
            change = with_entry if name.endswith("data.pkl") else bytes
            written.writestr(name, change(archive.read(name)))
    return path


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def ask(name: str) -> bytes:
    """The opcode for a class or function."""
    module, _, own = name.rpartition(".")
    return f"c{module}\n{own}\n".encode()


def test_the_module_of_an_enum_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_config.py").write_text(f"open({str(MARK)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as patch:
        module = ModuleType("own_config")
        patch.setitem(sys.modules, "own_config", module)
        module.__dict__["Kind"] = kind = enum.Enum("Kind", "A B", module="own_config")
        save_pickle({"model": STATE, kind.B: 1}, MODEL)
    assert_read_past(MODEL, ("own_config.Kind(2)",))
    assert "own_config" not in sys.modules and not MARK.exists()


class Loud:
    Kind = enum.Enum("Kind", {"A": 1}, qualname="Loud.Kind")

    def __setstate__(self, state: object) -> None:
        raise AssertionError("it was run")


def test_what_the_process_allows_is_not_used_and_stays_allowed_whatever_threads_read() -> None:
    allows = [Loud, (Loud, "argparse.Namespace")]
    with serialization.safe_globals(allows):
        before = {*serialization.get_safe_globals()}
        assert_read_past(save_pickle({"model": STATE, "args": argparse.Namespace(lr=1)}, MODEL), ("args",))
        assert_refused_unrun(save_pickle({"model": STATE, "x": Loud()}, MODEL), r"wants \w+\.Loud, more")
        paths = [save_pickle({"model": STATE, kind: HARMLESS[kind]}, Path(f"{kind}.pt")) for kind in HARMLESS]
        with ThreadPoolExecutor(8) as pool:
            read = [*pool.map(read_checkpoint, paths * 8)]
        assert {one.path.stem for one in read} == {one.left_behind[0] for one in read} == HARMLESS.keys()
        assert {*serialization.get_safe_globals()} == before >= {*allows}


# --- what is refused -----------------------------------------------------------------------------------------------
class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(MARK),)


class Whole(nn.Linear):
    """A module."""


Odd = enum.Enum("Odd", {"LIST": [1]})
REFUSED: dict[str, tuple[object, str]] = {
    "an array of numpy": ({"model": STATE, "x": np.ones(3)}, r"wants numpy\.\S*_reconstruct, more"),
    "a config that is an object": ({"model": STATE, "x": Loud()}, r"wants \w+\.Loud, more"),
    "an enum in a class": ({"model": STATE, "x": Loud.Kind.A}, r"wants \w+\.Loud, more"),
    "an enum of objects": ({"model": STATE, "x": Odd.LIST}, r"wants \w+\.Odd, more"),
    "a function": ({"model": STATE, "x": save_pickle}, r"wants \w+\.save_pickle, more"),
    "a model saved whole": (Whole(2, 2), r"wants \S*test_pickles\.Whole, more"),
    "a command": ({"model": STATE, "x": Bomb()}, r"wants \w+\.mkdir, more"),
    "no tensors": ({"epoch": 3}, "holds no tensors by name"),
    "one tensor": (torch.ones(3), "holds no tensors by name"),
    "a list": ([STATE], "holds no tensors by name"),
    "an optimizer": (OPTIMIZER, "holds no tensors by name"),
    "two models": ({"encoder": STATE, "decoder": OTHER}, r"2 state dicts \(encoder, decoder\), none"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "a in .* is sparse_coo of float32 on cpu, which"),
    "no numbers": ({"a": torch.ones(3, device="meta")}, "a in .* is strided of float32 on meta, which"),
    "double complex": ({"a": torch.ones(3, dtype=torch.complex128)}, "a in .* of complex128 on cpu"),
    "quantized": ({"a": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)}, "of qint8 on"),
    "repeated": (STATE | {"a": torch.zeros(1).expand(10**5, 10**5)}, "a in .* repeats 4 bytes to 40,0"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@both_forms
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_or_less_than_tensors_is_refused(kind: str, zipped: bool) -> None:
    content, message = REFUSED[kind]
    assert_refused_unrun(save_pickle(content, MODEL, zipped), message)


def test_a_pickle_of_no_torch_at_all_is_never_run() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        MODEL.write_bytes(pickle.dumps(Bomb(), protocol))
        assert_refused_unrun(MODEL, "model.pt")


OMEGACONF = (Path(__file__).parents[2] / "support" / "pickles" / "omegaconf.pkl").read_bytes()
"""Nodes of every type, of classes and an enum in `project.config`."""
OWN, ONE = ask("project.config.Mode"), b"K\x01"
MEMBER = OWN + ONE + b"\x85R"
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
    "a structured config of omegaconf 2.3": OMEGACONF[2:-1],  # without protocol and stop
    "a wrapped object": ask("torch._tensor._rebuild_from_type_v2") + b"(" + CLASS + CLASS + b")" + TRICKS + b"tR",
}


@both_forms
@pytest.mark.parametrize("kind", INERT)
def test_nothing_that_is_written_to_a_stand_in_is_believed(kind: str, zipped: bool) -> None:
    assert_read_past(spliced(INERT[kind], MODEL, zipped), ("x",))
    assert not {"omegaconf", "project", "project.config"} & sys.modules.keys()


COMMANDS = ("posix.system", "os.system", "subprocess.Popen", "builtins.exec", "builtins.eval", "__builtin__.eval")


def command(name: str) -> bytes:
    """Called with one value, as enums are."""
    word = f"open({str(MARK)!r}, 'w')" if name.endswith(("exec", "eval")) else f"touch {MARK}"
    return ask(name) + (b"](" + text("touch") + text(str(MARK)) + b"e" if "Popen" in name else text(word)) + b"\x85R"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "getattr of a class of torch": (ask("builtins.getattr") + ask("torch.Tensor") + text("data") + b"\x86R", "getattr"),
    "getattr of a stand-in": (ask("builtins.getattr") + CLASS + text("state") + b"\x86R", "getattr"),
    "getattr by no name": (ask("builtins.getattr") + OWN + text("A\n") + b"\x86R", "getattr"),
    "an enum called with a class": (OWN + ask("collections.OrderedDict") + b"\x85R", r"project\.config\.Mode"),
    "an enum called with two": (OWN + ONE + ONE + b"\x86R", r"project\.config\.Mode"),
    "an object of an own class": (OWN + b")\x81", r"project\.config\.Mode"),
    "an own class with a state": (OWN + ONE + b"\x85\x81" + TRICKS + b"b", r"project\.config\.Mode"),
    "a function of its own": (ask("project.config.run") + text("touch") + b"\x85R", r"project\.config\.run"),
    "arguments with arguments": (ask("argparse.Namespace") + ONE + b"\x85R", r"argparse\.Namespace"),
    "arguments with another state": (ask("argparse.Namespace") + b")\x81" + ONE + b"b", r"argparse\.Namespace"),
    "a type that is called": (ask("builtins.int") + ONE + b"\x85R", r"builtins\.int"),
    "a hint of a class": (ask("_operator.getitem") + CLASS + ONE + b"\x86R", r"operator\.getitem"),
    "a class of the library": (ask("subprocess.Popen") + text("touch") + b"\x85R", r"subprocess\.Popen"),
    "a class of torch": (ask("torch.package.PackageImporter") + text("a") + b"\x85R", r"torch\.\w+\.PackageImporter"),
    "a class of this": (ask("codebook_tools.errors.CodebookError") + ONE + b"\x85R", r"codebook_tools\.errors\.Co\w+"),
    "too many enums": (b"](" + b"".join(ask(f"project.E{i}") for i in range(65)) + b"e", r"project\.E0"),
}
for name in COMMANDS:
    own = rf"(\w+\.)?{name.partition('.')[2]}"
    HOSTILE |= {name: (command(name), own), f"{name} beside an enum": (b"](" + MEMBER + command(name) + b"e", own)}


@both_forms
@pytest.mark.parametrize("kind", HOSTILE)
def test_another_use_of_an_allowed_name_and_any_command_are_refused(kind: str, zipped: bool) -> None:
    fragment, name = HOSTILE[kind]
    assert_refused_unrun(spliced(fragment, MODEL, zipped), rf"wants (builtins\.)?{name}, more than tensors")


@pytest.mark.parametrize("name", [*COMMANDS, "posix.mkdir"])
def test_such_a_command_would_have_been_run(name: str) -> None:
    made = pickle.loads(pickle.dumps(Bomb()) if "mkdir" in name else b"\x80\x02" + command(name) + b".")
    if isinstance(made, subprocess.Popen):
        made.wait()
    assert MARK.exists()


ASKED = (
    *("argparse.Namespace", "builtins.dict", "builtins.getattr", "collections.OrderedDict", "collections.defaultdict"),
    *("numpy.dtype", "omegaconf.nodes.AnyNode", "pathlib.PosixPath", "project.config.Mode", "typing.List"),
    *("_operator.getitem", "torch.FloatStorage", "torch.Tensor", "torch._tensor._rebuild_from_type_v2"),
    *("torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_tensor_v2", "torch.nn.parameter.Parameter"),
)


def values() -> st.SearchStrategy[bytes]:
    """Opcodes that leave one value: allowed names and commands, called, made objects of, given states, put together."""
    leaves = [*map(ask, ASKED), *map(command, COMMANDS), TRICKS, text("__class__"), ONE, b"N", b")"]
    return st.recursive(
        st.sampled_from(leaves),
        lambda inner: st.one_of(
            st.builds(lambda use, one, other: one + other + use, st.sampled_from([b"R", b"\x81", b"b"]), inner, inner),
            st.builds(lambda items: b"(" + b"".join(items) + b"t", st.lists(inner, max_size=4)),
            st.builds(lambda items: b"](" + b"".join(items) + b"e", st.lists(inner, max_size=2)),
            st.builds(lambda key, value: b"}" + key + value + b"s", inner, inner),
        ),
        max_leaves=12,
    )


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fragment=values(), zipped=st.booleans())
def test_no_pickle_runs_anything(fragment: bytes, zipped: bool) -> None:
    before = {*serialization.get_safe_globals()}
    with contextlib.suppress(CodebookError):
        read_checkpoint(spliced(fragment, MODEL, zipped)).tensors()
    assert not MARK.exists() and {*serialization.get_safe_globals()} == before


def test_a_program_of_torchscript_is_refused_and_mappings_that_hold_each_other_are_searched_once() -> None:
    """The second mapping, a file of 25 KB, would otherwise be searched for years."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), MODEL)
    assert_refused_unrun(MODEL, "is a TorchScript program, which is not run; save")
    endless: dict[str, object] = {"w": torch.ones(3)}
    endless["model"] = endless
    shared: dict[str, object] = {"a": 1}
    for _ in range(5):
        shared = {str(i): shared for i in range(300)}
    for content in (endless, shared):
        assert_refused_unrun(save_pickle(content, MODEL), "holds no tensors by name")


def test_the_attributes_of_a_parameter_are_not_taken_for_its_methods() -> None:
    parameter = nn.Parameter(torch.ones(2))
    for name in ("numel", "detach", "element_size", "resolve_conj"):
        setattr(parameter, name, torch.device)
    assert read_checkpoint(save_pickle({"a": parameter}, MODEL)).tensor("a").tolist() == [1, 1]


def test_a_warning_is_one_line_whatever_names_are_in_it(codebook: Run, tiny: Path) -> None:
    save_pickle({"state_dict": load_file(tiny), "a\nerror: \x1b[31mall is lost": 1}, MODEL)
    done = codebook("quantize", MODEL, "--k", 8)
    assert done.exit_code == 0 and r"; a\nerror: \x1b[31mall is lost is left behind" in done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
