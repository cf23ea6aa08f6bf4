#!/usr/bin/env python3
"""Shows the machine code and the memory traffic of the CUDA kernel of RoI pooling, without a GPU.

Triton includes NVIDIA's assembler and disassembler, so the machine code for an A100 (sm_80) and an
H100 (sm_90) can be generated and read on any machine. The first table lists registers, spills, and
the width of loads, stores and atomic additions. The second table counts the cells that the RoIs of
a call read, and derives the bytes from them. Its times are computed, not measured. They are lower
bounds, as if only the DRAM and the L2 cache of an H100 took time.

Prints both tables as Markdown and writes them as JSON.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mask_head_plugin.ops import roi_pooling_triton as kernels
from mask_head_plugin.ops.axis_weights import AxisSamples, roi_align_samples

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DRAM_BYTES_PER_SECOND = 3.35e12
"""For an H100 SXM, from NVIDIA's data sheet."""

L2_BYTES_PER_SECOND = 5.5e12
"""For an H100, from published microbenchmarks; NVIDIA does not state this number."""

IMAGE_HW, STRIDES, NUM_CHANNELS, NUM_IMAGES = (800, 1344), (4, 8, 16, 32), 256, 2


@dataclass(frozen=True)
class Variant:
    """Settings that the kernel is compiled for."""

    capability: int
    dtype: str
    backward: bool
    size: int = 7
    sampling_ratio: int = 0


def compile_kernel(variant: Variant) -> Any:
    """Compiles a variant with Triton, for maps whose number of channels is a multiple of 16."""
    kernel = kernels.roi_align_kernel
    maps = "fp32" if variant.backward else variant.dtype  # gradients are summed in float32
    constants = {
        "pooled_height": variant.size,
        "pooled_width": variant.size,
        "sampling_ratio": variant.sampling_ratio,
        "aligned": True,
        "block_channels": kernels.MAX_BLOCK_BYTES // TYPES[maps].itemsize,
        "tile_rows": kernels.TILE_ROWS,
        "backward": variant.backward,
    }
    signature = {**dict.fromkeys(constants, "constexpr"), "num_channels": "i32"}
    signature |= {"pooled": f"*{variant.dtype}", "rois": "*fp32", "levels": "*i32"}
    for i in range(kernels.MAX_MAPS):
        signature[f"map{i}"] = f"*{maps}"
        signature |= {f"height{i}": "i32", f"width{i}": "i32", f"scale{i}": "fp32"}
    # Before 3.3, Triton has no type "constexpr", and uses other names for the constants and for the
    # arguments that are multiples of 16.
    is_old = "constants" in inspect.signature(ASTSource).parameters
    names = [x for x in kernel.arg_names if not (is_old and x in constants)]
    aligned = [x for x in kernel.arg_names if signature[x][0] == "*" or x == "num_channels"]
    places = [kernel.arg_names.index(x) for x in aligned]
    if is_old:
        from triton.backends.compiler import AttrsDescriptor

        attributes: Any = AttrsDescriptor.from_dict(
            {
                "arg_properties": {"tt.divisibility": places, "tt.equal_to": []},
                "cls": "AttrsDescriptor",
            }
        )
    else:
        attributes = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        **{"constants" if is_old else "constexprs": constants, "attrs": attributes},
    )
    target = GPUTarget("cuda", variant.capability, 32)
    return triton.compile(source, target=target, options=kernels.COMPILER_OPTIONS)


def machine_code(compiled: Any) -> dict[str, Any]:
    """Returns the resources and instructions of a compiled kernel.

    Returns:
        Registers per thread, bytes per thread that are spilled to memory, bytes of shared memory,
        and the number of instructions; the number of loads from and stores to global memory by
        width in bits; and the number of atomic additions by form.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in
               ("REG", "STACK", "LOCAL", "SHARED")}  # fmt: skip
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", code, re.M)
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": numbers["SHARED"],
        "instructions": len([x for x in opcodes if x != "NOP"]),
        "loads": _widths(opcodes, "LDG"),
        "stores": _widths(opcodes, "STG"),
        "atomics": dict(Counter(x for x in opcodes if re.match(r"RED\b|REDG|ATOMG", x))),
    }


def _cuobjdump(option: str, file: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [program, option, file], check=True, capture_output=True, text=True
    ).stdout


def _widths(opcodes: list[str], name: str) -> dict[int, int]:
    """Counts the instructions with this name by the number of bits that a thread moves."""
    bits = []
    for opcode in opcodes:
        if opcode.split(".")[0] == name:
            width = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
            bits.append(int(width[1]) if width else 32)
    return dict(sorted(Counter(bits).items()))


@dataclass(frozen=True)
class Work:
    """Memory traffic of one call, as numbers of cells and bins.

    Attributes:
        touched: number of distinct cells of the maps that are read.
        visits: the kernel's reads of cells or, in the backward pass, additions to cells.
        by_samples: reads of cells by a kernel that reads four cells per sample, as torchvision's.
        bins: bins of all RoIs.
    """

    touched: int
    visits: int
    by_samples: int
    bins: int


def random_rois(num_rois: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns boxes with sides of 16 to 600 pixels, log-uniform, and their levels."""
    height, width = IMAGE_HW
    sides = 16 * (600 / 16) ** torch.rand(num_rois, 2, generator=generator)
    corner = torch.rand(num_rois, 2, generator=generator)
    corner = corner * (torch.tensor([width, height]) - sides).clamp(min=0)
    level = torch.floor(4 + torch.log2(sides.prod(1).sqrt() / 224)).clamp(2, 5).long() - 2
    return torch.cat([corner, corner + sides], dim=1), level


def count_work(rois_per_image: int, size: int, ratio: int) -> Work:
    """Counts the traffic for NUM_IMAGES images with an FPN."""
    generator = torch.Generator().manual_seed(0)
    touched = visits = by_samples = 0
    for _ in range(NUM_IMAGES):
        boxes, levels = random_rois(rois_per_image, generator)
        for level, stride in enumerate(STRIDES):
            rois = boxes[levels == level] / stride
            height, width = (side // stride for side in IMAGE_HW)
            y = _cells(roi_align_samples(rois[:, 1], rois[:, 3], size, height, ratio), height)
            x = _cells(roi_align_samples(rois[:, 0], rois[:, 2], size, width, ratio), width)
            rows, columns = ((axis > 0).any(1).float() for axis in (y, x))
            touched += int((rows.T @ columns).gt(0).sum())
            visits += int(((y > 0).sum((1, 2)) * columns.sum(1)).sum())
            by_samples += int((y.sum((1, 2)) * x.sum((1, 2))).sum())
    return Work(touched, visits, by_samples, NUM_IMAGES * rois_per_image * size**2)


def _cells(samples: AxisSamples, num_cells: int) -> Tensor:
    """Returns how many samples of each bin read each cell along one axis, (R, P, L)."""
    counts = torch.zeros(*samples.cell.shape[:2], num_cells)
    cells, inside = (
        samples.cell.flatten(2).long(),
        samples.inside[..., None].expand_as(samples.cell),
    )
    return counts.scatter_add_(2, cells, inside.flatten(2).float())


def code_row(variant: Variant) -> dict[str, Any]:
    code = machine_code(compile_kernel(variant))
    ways = {name: ", ".join(f"{count} x {kind}" for kind, count in code[name].items())
            for name in ("loads", "stores", "atomics")}  # fmt: skip
    ways["atomics"] = re.sub(r"\bREDG?\.E\.ADD\.(\w+)[\w.]*", r"\1", ways["atomics"])
    return {
        "GPU": f"sm_{variant.capability}",
        "pass": "backward" if variant.backward else "forward",
        "type": variant.dtype,
        "P": variant.size,
        "ratio": variant.sampling_ratio,
        **{name: code[name] for name in ("registers", "spilled", "shared", "instructions")},
        **ways,
    }


def work_row(rois_per_image: int, size: int, ratio: int, dtype: str) -> dict[str, Any]:
    work, item = count_work(rois_per_image, size, ratio), TYPES[dtype].itemsize
    dram = NUM_CHANNELS * item * (work.touched + work.bins)
    cache = NUM_CHANNELS * item * (work.visits + work.bins)
    atomics = NUM_CHANNELS * 4 * work.visits
    return {
        "RoIs": f"{NUM_IMAGES} x {rois_per_image}",
        "P": size,
        "ratio": ratio,
        "type": dtype,
        "cells, 1000": round(work.visits / 1e3),
        "by samples, 1000": round(work.by_samples / 1e3),
        "DRAM, MB": round(dram / 1e6),
        "L2, MB": round(cache / 1e6),
        "forward at least, ms": round(
            1e3 * max(dram / DRAM_BYTES_PER_SECOND, cache / L2_BYTES_PER_SECOND), 3
        ),
        "atomics, MB": round(atomics / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("output/benchmarks/triton_kernels.json")
    )
    args = parser.parse_args()
    variants = itertools.product((80, 90), TYPES, (False, True), (7,), (0, 2))
    calls = itertools.product((512, 1000), (7, 14), (0, 2), ("fp32", "fp16"))
    results = {
        "triton": triton.__version__,
        "machine code": [code_row(Variant(*variant)) for variant in variants],
        "work": [work_row(*call) for call in calls],
    }
    for name in ("machine code", "work"):
        print(f"\n{tabulate(results[name], headers='keys', tablefmt='github')}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
