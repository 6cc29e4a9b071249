"""Every kernel compiles for every architecture without a GPU, without spills, within the chip's shared memory."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

pytest.importorskip("cupy_backends.cuda.libs.nvrtc")

from fp4rt.errors import Fp4rtError  # noqa: E402
from fp4rt.ops.cuda import layouts, linear  # noqa: E402
from fp4rt.ops.cuda import compile as compiling  # noqa: E402
from fp4rt.ops.cuda.device import SHARED_LIMIT  # noqa: E402
from fp4rt.ops.cuda.tiles import Layout  # noqa: E402

ARCHITECTURES = {"sm_75": 75, "sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90a": 90}


def variants() -> list[tuple[str, str, dict[str, int], int]]:
    """(arch, stem, defines, dynamic shared bytes) of all that the wrappers may launch, as their `variants` say."""
    import fp4rt.ops.cuda as package

    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return [(arch, *variant) for arch, capability in ARCHITECTURES.items()
            for module in modules if hasattr(module, "variants") for variant in module.variants(capability)]


def name(variant: tuple) -> str:
    arch, stem, defines, _ = variant
    return "-".join([arch, stem, *(f"{key.lower()}={value}" for key, value in defines.items())])


@pytest.mark.parametrize("variant", variants(), ids=name)
def test_compiles_without_spills_within_shared_memory(variant: tuple):
    arch, stem, defines, dynamic = variant
    binary = compiling.compile_kernel(stem, arch, defines)
    assert binary.kind == "cubin" and binary.data[:4] == b"\x7fELF" and binary.resources
    for entry, resources in binary.resources.items():
        assert resources.spill_bytes == 0 and resources.stack_bytes == 0, f"{entry}: {resources}"
        assert resources.shared_bytes + dynamic <= SHARED_LIMIT[ARCHITECTURES[arch]], f"{entry}: {resources}"


@pytest.mark.parametrize("capability", ARCHITECTURES.values())
@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: f"{layout.stem}-{layout.tile_bytes}")
def test_few_tokens_fit_shared_memory_and_are_summed_in_one_order(capability: int, layout: Layout):
    limit = SHARED_LIMIT[capability]
    for k in (64, 2880, 4096, 14336, 28672, 53248):
        plans = [linear.few_plan(layout, limit, tokens, k) for tokens in range(1, 9)]
        assert len({plan.parts for plan in plans}) == 1 and all(plan.shared <= limit for plan in plans)
        alone = [plan.division in (linear.UNDIVIDED, linear.WHOLE) for plan in plans]
        assert alone == sorted(alone, reverse=True)


@pytest.mark.parametrize("arch", ["compute_75", "compute_80", "compute_90"])
def test_ptx_for_newer_gpus(arch: str):
    binary = compiling.compile_kernel("scale_columns", arch)
    assert binary.kind == "ptx" and f".target sm_{arch[8:]}".encode() in binary.data


def test_only_what_lasts_is_promised_not_to_change():
    """`const __restrict__` lets the compiler read before a kernel has waited for the one that writes."""
    weights = {"A", "D", "bias", "dt_bias", "experts_norm", "norm", "row_scale", "sinks", "table", "tiles", "weight",
               "weight1", "weight2"}
    put_before_the_step = {"lengths", "pages", "positions", "rows", "slots", "starts", "tokens"}
    dependent = 0
    for path in sorted(compiling.kernel_directory().glob("*.cu*")):
        source = path.read_text()
        for parameters in re.findall(r'extern "C" __global__([^{]*)\{', source):
            if "wait_for_predecessor" in source:
                dependent += 1
                promised = set(re.findall(r"const [\w ]+\* *__restrict__ (\w+)", parameters))
                assert promised <= weights | put_before_the_step, (path.name, parameters)
    assert dependent > 20


def test_every_kernel_file_belongs_to_a_wrapper():
    files = {path.stem for path in compiling.kernel_directory().glob("*.cu")}
    assert files == {stem for _, stem, _, _ in variants()}


def test_a_corrupt_cache_entry_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "cache_directory", lambda: tmp_path)
    first = compiling.compile_kernel("scale_columns", "sm_80")
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    assert compiling.compile_kernel("scale_columns", "sm_80") == first
    assert compiling.compile_kernel("scale_columns", "sm_80") == first
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]


def test_an_error_in_a_kernel_names_its_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "bad.cu").write_text("// Bad.\n#include \"bad.cuh\"\n")
    (tmp_path / "bad.cuh").write_text("// Bad.\nint x = y;\n")
    monkeypatch.setattr(compiling, "kernel_directory", lambda: tmp_path)
    with pytest.raises(Fp4rtError, match=r'bad\.cuh\(2\).*"y" is undefined'):
        compiling.compile_kernel("bad", "sm_80")
