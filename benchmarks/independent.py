"""A second measurement of a VQ-VAE checkpoint, which shares no code with codebook_tools: the witness for its numbers.

    python benchmarks/independent.py MODEL.safetensors --test-data TEST.tar [--input-range=-1,1]
        [--network FILE.py:FUNCTION] [--json]

Without --network, MODEL is of the zalando tutorial's layout. Every image of TEST (a tar or a folder) counts.
The network runs in float32 on the CPU; distances and sums are float64, counts are integers.
"""

import argparse
import importlib.util
import io
import json
import math
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Half = Callable[[Tensor], Tensor]  # encode or decode


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floats as float32: 8 bytes of header length, a JSON header, the bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    weights: dict[str, Tensor] = {}
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            tensor = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
            weights[key] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def find_codebook(weights: dict[str, Tensor]) -> Tensor:
    """(K, dim): the one 2-D tensor with "embedding" or "codebook" in its key."""
    keys = [key for key, w in weights.items() if w.ndim == 2 and ("embedding" in key or "codebook" in key)]
    if len(keys) != 1:
        sys.exit(f"one 2-D tensor with 'embedding' or 'codebook' in its key is needed, found {len(keys)}: {keys}")
    return weights[keys[0]]


def zalando(weights: dict[str, Tensor]) -> tuple[Half, Half, int]:
    """encode, decode and the number of image channels, of the zalando tutorial's network."""
    convs = ["_encoder._conv_1", "_encoder._conv_2", "_encoder._conv_3", "_pre_vq_conv"]
    convs += ["_decoder._conv_1", "_decoder._conv_trans_1", "_decoder._conv_trans_2"]
    depth = sum(key.startswith("_encoder._residual_stack.") for key in weights) // 2
    stacks = [f"{side}._residual_stack._layers.{i}._block" for side in ("_encoder", "_decoder") for i in range(depth)]
    expected = {f"{name}.{kind}" for name in convs for kind in ("weight", "bias")}
    expected |= {f"{name}.{j}.weight" for name in stacks for j in (1, 3)}
    # A tensor that is missing, or that nothing below reads, would mean another network than the one measured here.
    if differing := expected ^ {key for key in weights if not key.startswith("_vq_vae.")}:
        sys.exit(f"not of the zalando layout, give --network: {sorted(differing)}")

    def conv(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)

    def conv_transpose(x: Tensor, name: str) -> Tensor:
        return functional.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)

    def residual_stack(x: Tensor, side: str) -> Tensor:
        for i in range(depth):
            block = f"{side}._residual_stack._layers.{i}._block"
            x = functional.relu(x)  # in place in the original: the skip path carries relu(x) too
            inner = functional.relu(functional.conv2d(x, weights[f"{block}.1.weight"], padding=1))
            x = x + functional.conv2d(inner, weights[f"{block}.3.weight"])
        return functional.relu(x)

    def encode(x: Tensor) -> Tensor:
        x = functional.relu(conv(x, "_encoder._conv_1", 2, 1))
        x = functional.relu(conv(x, "_encoder._conv_2", 2, 1))
        x = conv(x, "_encoder._conv_3", 1, 1)
        return conv(residual_stack(x, "_encoder"), "_pre_vq_conv", 1, 0)

    def decode(x: Tensor) -> Tensor:
        x = residual_stack(conv(x, "_decoder._conv_1", 1, 1), "_decoder")
        x = functional.relu(conv_transpose(x, "_decoder._conv_trans_1"))
        return conv_transpose(x, "_decoder._conv_trans_2")

    return encode, decode, weights["_encoder._conv_1.weight"].shape[1]


def user_network(target: str, weights: dict[str, Tensor], codebook_size: int) -> tuple[Half, Half, int]:
    """The same three, of the module that FUNCTION(codebook_size=K) of FILE.py makes. target: FILE.py:FUNCTION."""
    file, _, function = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("user_network", file)
    if spec is None or spec.loader is None:
        sys.exit(f"--network {target} is not FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = getattr(module, function)(codebook_size=codebook_size).eval()
    network.load_state_dict(weights)  # strict: a missing or unknown key is an error
    first = next(m for m in getattr(network, "encoder", network).modules() if isinstance(m, nn.Conv2d))
    return network.encode, network.decode, first.in_channels


def read_images(path: Path, channels: int) -> Tensor:
    """(n, channels, h, w) uint8: every image of a tar or a folder, in name order, grey or RGB."""
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.suffix.lower() in IMAGES}
    else:
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.isfile() and Path(m.name).suffix.lower() in IMAGES]
            files = {m.name: stream.read() for m in members if (stream := tar.extractfile(m))}
    mode = {1: "L", 3: "RGB"}[channels]
    arrays = [np.asarray(Image.open(io.BytesIO(files[name])).convert(mode)) for name in sorted(files)]
    if len({array.shape for array in arrays}) != 1:
        sys.exit(f"{path}: {len(arrays)} images, of sizes {sorted({a.shape[:2] for a in arrays})}; one size is needed")
    height, width = arrays[0].shape[:2]
    return torch.from_numpy(np.stack(arrays).reshape(-1, height, width, channels)).permute(0, 3, 1, 2)


def measure(
    images: Tensor, encode: Half, decode: Half, codebook: Tensor, low: float, high: float
) -> dict[str, int | float]:
    size, dim = codebook.shape
    counts = torch.zeros(size, dtype=torch.int64)
    image_error = latent_error = 0.0
    for batch in torch.split(images, 100):
        original = batch.float() / 255
        latents = encode(original * (high - low) + low)
        n, _, h, w = latents.shape
        rows = latents.permute(0, 2, 3, 1).reshape(-1, dim).double()
        # Differences, not the expanded |x|² - 2xy + |y|²: nothing cancels.
        nearest = torch.cdist(rows, codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        quantised = codebook[nearest]
        latent_error += ((rows - quantised.double()) ** 2).sum().item()
        output = decode(quantised.reshape(n, h, w, dim).permute(0, 3, 1, 2))
        restored = ((output - low) / (high - low)).clamp(0, 1)
        if restored.shape != original.shape:
            sys.exit(f"images of shape {tuple(original.shape)} come back as {tuple(restored.shape)}")
        counts += torch.bincount(nearest, minlength=size)
        image_error += ((restored.double() - original.double()) ** 2).sum().item()
    total = int(counts.sum())
    shares = counts[counts > 0].double() / total
    entropy = -(shares * shares.log()).sum().item()
    mse = image_error / images.numel()
    used = int((counts > 0).sum())
    return {
        "used": used, "usage": used / size, "used_10": int((counts >= 10).sum()), "perplexity": math.exp(entropy),
        "bits": entropy / math.log(2), "mse": mse, "psnr": -10 * math.log10(mse), "distortion": latent_error / total,
        "top_share": shares.max().item(), "K": size, "images": len(images), "latents": total,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="An independent measurement of a VQ-VAE checkpoint.")
    parser.add_argument("model", type=Path, metavar="MODEL.safetensors")
    parser.add_argument("--test-data", type=Path, required=True, metavar="TEST", help="a tar or a folder of images")
    parser.add_argument("--input-range", default="-1,1", help="what the network takes; default %(default)s")
    parser.add_argument("--network", metavar="FILE.py:FUNCTION", help="default: the zalando tutorial's layout")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    low, high = map(float, args.input_range.split(","))
    weights = read_weights(args.model)
    codebook = find_codebook(weights)
    network = user_network(args.network, weights, len(codebook)) if args.network else zalando(weights)
    encode, decode, channels = network
    with torch.inference_mode():
        result = measure(read_images(args.test_data, channels), encode, decode, codebook, low, high)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<10} {value:.8g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
