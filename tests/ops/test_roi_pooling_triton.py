"""The CUDA kernel: run by Triton's interpreter on the CPU, and compiled for two GPUs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from conftest import load_triton_kernels, relative_error

from mask_head_plugin import ops

triton = pytest.importorskip("triton")


@pytest.fixture
def interpreted(triton_interpreter):
    return load_triton_kernels("interpreted").multilevel_roi_align


def make_input(dtype=torch.float32, layout=torch.contiguous_format, channels=5):
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, channels, *hw, generator=generator)
        .to(dtype)
        .contiguous(memory_format=layout)
        for hw in ((12, 15), (6, 8))
    ]
    rois = torch.rand(7, 5, generator=generator) * 40
    rois[:, 3:] = rois[:, 1:3] + torch.rand(7, 2, generator=generator) * 30
    rois[:, 0] = torch.arange(7) % 2
    rois[1, 3] = rois[1, 1] - 5  # inverted
    rois[2, 1:] = torch.tensor([-30.0, -20, 90, 70])  # over the border
    rois[3, 1:] = 900  # off the map, and without area
    return maps, rois, torch.tensor([0, 0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_equals_the_cpu_operator(ratio, aligned, layout, interpreted):
    maps, rois, levels = make_input(layout=layout)
    results = []
    for operator in (interpreted, ops.roi_align):
        inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
        options = ((3, 2), (0.25, 0.125), ratio, aligned)
        if operator is ops.roi_align:
            pooled = operator(inputs, rois, *options, levels=levels)
        else:
            pooled = operator(inputs, rois, levels, *options)
        weights = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape)
        results.append([pooled, *torch.autograd.grad((pooled * weights).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape and relative_error(actual, expected) <= 1e-6
    assert results[0][1].stride() == maps[0].stride(), "gradients keep the layout of the maps"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_summed_in_float32(dtype, interpreted):
    maps, rois, levels = make_input(dtype, channels=3)
    results = []
    for scale in (torch.float32, dtype):
        inputs = [x.to(scale).requires_grad_() for x in maps]
        pooled = interpreted(inputs, rois, levels, (2, 2), (0.25, 0.125), 2, True)
        results.append([pooled, *torch.autograd.grad(pooled.sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual.float(), expected) <= torch.finfo(dtype).eps


def test_more_channels_than_a_block(interpreted):
    maps, rois, levels = make_input(channels=130)
    actual = interpreted(maps, rois[:3], levels[:3], (1, 2), (0.25, 0.125), 1, True)
    expected = ops.roi_align(maps, rois[:3], (1, 2), (0.25, 0.125), 1, levels=levels[:3])
    assert relative_error(actual, expected) <= 1e-6


def test_no_rois(interpreted):
    maps, rois, levels = make_input()
    maps = [x.requires_grad_() for x in maps]
    pooled = interpreted(maps, rois[:0], levels[:0], (2, 2), (0.25, 0.125), 2, True)
    pooled.sum().backward()
    assert pooled.shape == (0, 5, 2, 2) and maps[0].grad.abs().max() == 0


def test_levels_and_rois_with_strides(interpreted):
    maps, rois, levels = make_input(channels=3)
    expected = interpreted(maps, rois, levels, (2, 2), (0.25, 0.125), 1, True)
    strided = levels.int().repeat_interleave(2)[::2], rois.repeat(1, 2)[:, :5]
    actual = interpreted(maps, strided[1], strided[0], (2, 2), (0.25, 0.125), 1, True)
    assert torch.equal(actual, expected)


def test_what_does_not_fit_is_refused(interpreted):
    maps, rois, levels = make_input(channels=3)
    options = ((2, 2), (0.25, 0.125), 1, True)
    with pytest.raises(ValueError, match="must agree in N, C, type"):
        interpreted([maps[0], maps[1].half()], rois, levels, *options)
    with pytest.raises(ValueError, match="must agree in N, C, type"):
        interpreted([x.double() for x in maps], rois, levels, *options)
    with pytest.raises(ValueError, match=r"rois must be \(R, 5\)"):
        interpreted(maps, torch.zeros(7, 6), levels, *options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backward", [False, True])
def test_compiles_for_gpus_that_need_not_be_there(backward, dtype, capability, monkeypatch):
    """The machine code of an A100 (sm_80) and of an H100 (sm_90), from Triton's own assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = load_triton_kernels("compiled")
    kernel = module._roi_align_kernel
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    constants = {
        "dtype": module._TRITON_TYPES[torch.float32 if backward else types[dtype]],
        "channels_last": True,
        "pooled_height": 7,
        "pooled_width": 7,
        "sampling_ratio": 0,
        "aligned": True,
        "block_channels": 128,
        "backward": backward,
    }
    signature = {
        **dict.fromkeys(constants, "constexpr"),
        "table": "*i64",
        "pooled": f"*{dtype}",
        "rois": "*fp32",
        "levels": "*i32",
        "scales": "*fp32",
        "num_channels": "i32",
    }
    # Triton before 3.3 has no type "constexpr", and another name for their values.
    is_old = "constants" in inspect.signature(ASTSource).parameters
    names = [x for x in kernel.arg_names if not (is_old and x in constants)]
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        **{"constants" if is_old else "constexprs": constants},
    )
    target, options = GPUTarget("cuda", capability, 32), module.COMPILER_OPTIONS
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx and compiled.asm["cubin"]
    assert "add.rn.f32" in ptx and ("atom" in ptx) == backward
    # ceil(side / 7) of a side of 21 cells is 4 where 21 / 7 is 21 * (1 / 7), rounded twice.
    assert "div.rn.f32" in ptx
    approximate = re.findall(r"\b(?:div\.full|div\.approx|rcp|fma)\S*", ptx)
    assert not approximate, "samples are counted and placed as on the CPU"
