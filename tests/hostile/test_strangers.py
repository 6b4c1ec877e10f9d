"""Files from strangers: any bytes end in a result or in one clear line."""

from __future__ import annotations

import json
import random
import sys
from base64 import b64decode
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, assert_refused
from PIL import Image
from places import TRUST
from torch import nn
from weight_files import safetensors_bytes

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.image_decoding import decode_picture
from codebook_tools.errors import CodebookError
from codebook_tools.models.size_guard import bounded
from codebook_tools.runtime.safe_io import read_text

pytestmark = pytest.mark.hostile

sys.path.append(str(TRUST))
targets = import_module("targets")


SLOW = ("config", "recipe", "parquet of tokens")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Cut short, or with some bytes changed, doubled or left out."""
    if chance.random() < 0.2:
        return data[: chance.randrange(len(data) + 1)]
    content = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(len(content) + 1)
        kind = chance.random()
        if kind < 0.6 and at < len(content):
            content[at] = chance.choice([0, 1, 127, 128, 255, content[at] ^ 1 << chance.randrange(8)])
        elif kind < 0.8:
            content[at:at] = content[at : at + chance.choice([1, 4, 8, 64])]
        else:
            del content[at : at + chance.choice([1, 4, 8, 64])]
    return bytes(content)


@pytest.mark.parametrize("name", targets.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    target, chance = targets.TARGETS[name], random.Random(name)
    target.around(tmp_path)
    seeds = target.seeds()
    for data in seeds[:: 4 if name in SLOW else 1]:
        targets.tried(target, tmp_path, data)
    for _ in range(20 if name in SLOW else 200):
        targets.tried(target, tmp_path, damaged(chance.choice(seeds), chance))


def test_every_target_can_read_what_is_sound(tmp_path: Path) -> None:
    """Otherwise the others would be tried in vain."""
    for i, (name, target) in enumerate(targets.TARGETS.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        target.around(folder)
        assert targets.tried(target, folder, target.seeds()[0]) is None, name


def test_a_recipe_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    data = f"surgeries: [!!python/object/apply:os.system ['touch {tmp_path / 'mark'}']]\n".encode()
    assert targets.tried(targets.TARGETS["recipe"], tmp_path, data) is not None
    assert not (tmp_path / "mark").exists()


def test_a_config_of_another_size_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    target = targets.TARGETS["config"]
    target.around(tmp_path)
    huge = {"num_vq_embeddings": 10**12, "layers_per_block": 10**12, "latent_channels": 10**9}
    for change in [{key: n} for key, n in huge.items()] + [{"block_out_channels": n} for n in ([10**6], [4] * 300)]:
        message = targets.tried(target, tmp_path, json.dumps({**targets.VQMODEL, **change}).encode())
        assert message and str(tmp_path) in message, change


def test_a_network_is_made_with_as_many_weights_as_its_file_has_and_no_more() -> None:
    made = bounded(lambda: nn.Linear(1000, 1000), 2, 1_001_000, "c.json")
    assert next(made.parameters()).device.type == "cpu"
    with pytest.raises(CodebookError, match=r"c\.json describes another model than its weights: it has many times"):
        bounded(lambda: nn.Linear(100_000, 100_000), 2, 1000, "c.json")
    with pytest.raises(CodebookError, match="many times as many layers"):
        bounded(lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**12))), 2, 10**9, "c.json")
    # on the meta device a tensor has no numbers to make a network by
    assert bounded(lambda: nn.Linear(int(torch.ones(3).sum().item()), 2), 2, 8, "c.json").in_features == 3


def test_text_is_read_up_to_a_length(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12345")
    assert read_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(ValueError, match="it has 5 bytes, more than 4"):
        read_text(tmp_path / "a", 4)


def test_a_huge_trace_is_refused_at_once(tiny: Path, codebook: Run, tmp_path: Path) -> None:
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    assert_refused(codebook("diagnose", tiny, "--trace", tmp_path / "t.json"), "1,099,511,627,776 bytes")


def test_a_header_of_a_hundred_megabytes_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    words = b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(2_000_000)) + b"}}"
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(words))
    with pytest.raises(CodebookError, match=r"m\.safetensors: a header of 24,888,908 bytes; the longest read has 16,"):
        read_checkpoint(tmp_path / "m.safetensors")


STEERING = "a\x1b[2J\r\n\x07\x9b31m[bold][/x]:smile:"
"""Clears a terminal's screen, goes up, rings and turns red, where it gets there as it is; and markup of ours."""


def test_names_that_would_steer_a_terminal_are_shown_not_sent(codebook: Run, tmp_path: Path) -> None:
    key = f"{STEERING}.quantize.embedding.weight"
    header = json.dumps({key: {"dtype": "F32", "shape": [16, 4], "data_offsets": [0, 256]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(256)))
    for arguments in (("inspect", path), ("inspect", path, "--json"), ("measure", path)):
        done = codebook(*arguments)
        assert "31m[bold][/x]:smile:.quantize" in done.stdout + done.stderr
        assert not set("\x1b\r\x07\x9b") & set(done.stdout + done.stderr)
    assert_refused(done, r"(codebook a\x1b[2J \x07\x9b31m[bold][/x]:smile:.quantize.embedding.weight, 16x4)")


def test_a_picture_of_more_pixels_than_its_bytes_can_hold_is_refused_before_they_are_made(tmp_path: Path) -> None:
    bomb = b64decode("R0lGODdhBIAAAAAAACwAAAAQBAAEAAAICQABCBxIsCCAgAA7")  # a GIF of 32,772 x 2,576 pixels
    with pytest.raises(ValueError, match=r"too many pixels: .* in 36 bytes"):
        decode_picture(bomb)
    blank = BytesIO()
    Image.new("1", (100_000, 167)).save(blank, "PNG")  # as blank as can be, and no more than 2^24 pixels
    assert decode_picture(blank.getvalue()).shape == (1, 167, 100_000)


def parquet_of(indices: object) -> bytes:
    pa = pytest.importorskip("pyarrow")
    file = BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"indices": indices}), file, store_schema=False)
    return file.getvalue()


def tried_tokens(data: bytes, folder: Path) -> str | None:
    message: str | None = targets.tried(targets.TARGETS["parquet of tokens"], folder, data)
    return message


def test_a_parquet_file_may_be_damaged_anywhere_in_its_footer(tmp_path: Path) -> None:
    """Asked for the codec of a column that has none, pyarrow ended the whole process."""
    sound = parquet_of([1, 2])
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    for at in range(footer, len(sound) - 8):
        for other in (0x03, 0x7F, 0xFF, sound[at] ^ 1):
            tried_tokens(sound[:at] + bytes([other]) + sound[at + 1 :], tmp_path)


def test_a_row_that_repeats_one_token_to_gigabytes_and_a_name_that_is_no_text_are_refused(tmp_path: Path) -> None:
    """For the name, pyarrow raises a UnicodeDecodeError, which is none of its own errors."""
    pa, count = pytest.importorskip("pyarrow"), (1 << 24) + 1
    row = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int8)))
    message = tried_tokens(parquet_of(row), tmp_path)
    assert message and "indices.list.element repeats itself to 16,777,217 values" in message
    message = tried_tokens(parquet_of([1, 2]).replace(b"indices", b"\x95" * 7), tmp_path)
    assert message and "is not a sound parquet file" in message
