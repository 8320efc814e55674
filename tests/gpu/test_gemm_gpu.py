"""Products by cuBLASLt's algorithms as tables name them, and the measuring that makes tables, on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.gemm.multiply import GpuGemm, multiply_by_torch
from longshore_server.native.gemm.plans import Algorithm, Plan, Plans, Product, find_plans
from longshore_server.native.model.fused_ops import quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = [Product("bfloat16", 512, 256), Product("float16", 512, 256), Product("float8_e4m3fn", 512, 256)]
MAX_ERROR = 1e-2


def _lt():
    from longshore_server.native.gemm.cublaslt import cublaslt_of

    return cublaslt_of(torch.device("cuda", torch.cuda.current_device()))


def _matrix(product: Product, height: int) -> torch.Tensor:
    is_fp8 = product.dtype == "float8_e4m3fn"
    dtype = torch.bfloat16 if is_fp8 else getattr(torch, product.dtype)
    drawn = torch.randn(height, product.width, device="cuda", dtype=dtype)
    return quantize_rows(drawn).values if is_fp8 else drawn


def _output_dtype(product: Product) -> torch.dtype:
    return torch.float16 if product.dtype == "float16" else torch.bfloat16


def _is_right(output: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> bool:
    exact = rows.double() @ weight.double().t()
    return bool((output.double() - exact).norm() < MAX_ERROR * exact.norm())


@torch.inference_mode()
def test_each_plan_that_comes_along_is_the_product(tmp_path) -> None:
    lt = _lt()
    tables = find_plans(torch.cuda.get_device_name(), lt.version, tmp_path)
    if not tables:
        pytest.skip("no table comes along for this GPU and library")
    gemm = GpuGemm(lt, tables)
    for product, plans in tables[0].products.items():
        weight = _matrix(product, product.num_outputs)
        for plan in plans:
            for num_rows in {plan.first_row, (plan.first_row + plan.last_row) // 2, plan.last_row} - {1}:
                rows = _matrix(product, num_rows)
                assert gemm._matmul(rows.dtype, _output_dtype(product), num_rows, *weight.shape) is not None
                output = gemm(rows, weight, None, _output_dtype(product))
                expected = multiply_by_torch(rows, weight, None, _output_dtype(product))
                error = (output.float() - expected.float()).norm() / expected.float().norm()
                assert bool(error < MAX_ERROR), (product, plan, num_rows)
        torch.cuda.empty_cache()


@torch.inference_mode()
def test_every_guess_of_the_library_is_the_product_and_can_be_captured() -> None:
    from longshore_server.native.gemm.cublaslt import Matmul, guesses

    torch.manual_seed(0)
    lt = _lt()
    for product in SMALL:
        weight, dtype = _matrix(product, product.num_outputs), _output_dtype(product)
        for num_rows in (1, 33, 300):
            algorithms = guesses(lt, product, num_rows, dtype, 8)
            assert algorithms
            for algorithm in algorithms:
                matmul = Matmul(lt, product, num_rows, dtype, algorithm)
                rows = _matrix(product, num_rows)
                assert _is_right(matmul(rows, weight), rows, weight)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    output = matmul(rows, weight)
                rows.copy_(_matrix(product, num_rows))
                graph.replay()
                assert _is_right(output, rows, weight)


@torch.inference_mode()
def test_few_rows_times_a_matrix() -> None:
    """Whole or in parts, of tiles that fill a chip or do not, and whatever stands behind the rows."""
    from longshore_server.native.gemm import gluon_few_rows

    torch.manual_seed(2)
    shapes = (
        (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672), (57344, 8192),
        (128256, 4096), (64, 256), (192, 1280), (2560, 8192), (8192, 2048),
    )  # fmt: skip
    for num_outputs, width in shapes:
        for dtype in ("bfloat16", "float16", "float8_e4m3fn"):
            product = Product(dtype, num_outputs, width)
            weight, output_dtype = _matrix(product, num_outputs), _output_dtype(product)
            memory = _matrix(product, 100)
            memory.view(torch.uint8)[64:] = 0xFF  # not numbers
            most = gluon_few_rows.MAX_ROWS[weight.element_size()]
            for num_rows in (each for each in (2, 7, 8, 9, 31, 32, 33, 64) if each <= most):
                rows = memory[64 - num_rows : 64]
                assert gluon_few_rows.can_multiply(rows, weight)
                whole = gluon_few_rows.multiply_few_rows(rows, weight, output_dtype)
                assert whole.dtype == output_dtype and _is_right(whole, rows, weight)
                parts = gluon_few_rows.multiply_few_rows(rows, weight, output_dtype, may_split=True)
                total = parts if parts.ndim == 2 else parts.double().sum(0)
                assert _is_right(total, rows, weight), (product, num_rows)
                again = gluon_few_rows.multiply_few_rows(rows, weight, output_dtype, may_split=True)
                assert torch.equal(again, parts)
            assert not gluon_few_rows.can_multiply(memory[:1], weight)
            assert not gluon_few_rows.can_multiply(memory[: most + 1], weight)
            assert not gluon_few_rows.can_multiply(memory[:8, :-16], weight[:, :-16])
        torch.cuda.empty_cache()


@torch.inference_mode()
def test_few_rows_wait_for_the_kernel_that_makes_them() -> None:
    """Captured behind one another, each product reads what the one before wrote; thousands of times."""
    torch.manual_seed(3)
    gemm = GpuGemm(None, [])
    product = Product("bfloat16", 4096, 4096)
    weights = [_matrix(product, 4096) / 64 for _ in range(4)]  # a product keeps its rows' size

    def run(rows: torch.Tensor, multiply) -> torch.Tensor:
        for weight in weights * 4:
            rows = multiply(rows, weight, None, torch.bfloat16)
        return rows

    rows = _matrix(product, 16)
    run(rows, gemm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(rows, gemm)
    for _ in range(20):
        rows.copy_(_matrix(product, 16))
        expected = run(rows, multiply_by_torch).float()
        results = []
        for _ in range(20):
            graph.replay()
            results.append(output.clone())
        assert all(torch.equal(each, results[0]) for each in results)
        assert (results[0].float() - expected).norm() < 5 * MAX_ERROR * expected.norm()


def test_kernels_of_few_rows_are_compiled_before_a_step_needs_them() -> None:
    from longshore_server.native.gemm.gluon_few_rows import _few_rows_kernel
    from longshore_server.native.gpu.warm_kernels import KernelWarmer
    from longshore_server.native.model.products import make_product

    device = torch.device("cuda", torch.cuda.current_device())
    linears = [torch.nn.Linear(1024, 1088, False, device, torch.bfloat16) for _ in range(3)]
    gemm = GpuGemm(None, [])
    model = torch.nn.ModuleList(
        [make_product(linears[:1], True, gemm), make_product(linears[1:2], False, gemm)]
    )
    model += [make_product(linears[2:], False)]  # not multiplied by it
    cache = PagedKVCache([LayerGeometry(1, 64, 64)], 1, 16, torch.bfloat16, device)
    warmer = KernelWarmer(model, cache)
    warmer.settle(60.0)
    compiled = _few_rows_kernel.device_caches[device.index][0]
    num_kernels = len(compiled)
    with torch.inference_mode():
        for product in model[:2]:
            for num_rows in range(2, 65):
                product(torch.zeros(num_rows, 1024, device=device, dtype=torch.bfloat16))
    assert len(compiled) == num_kernels
    warmer.close()


@torch.inference_mode()
def test_what_a_plan_cannot_do_is_left_to_torch(caplog) -> None:
    torch.manual_seed(1)
    product = SMALL[0]
    nonsense = Algorithm(66, 599, 1, 0, 0, 99, 36, 0, 5)
    gemm = GpuGemm(_lt(), [Plans("", 0, {product: [Plan(1, 96, nonsense)]})])
    weight, rows = _matrix(product, product.num_outputs), _matrix(product, 65)  # no kernel of our own
    bias = torch.randn(product.num_outputs, device="cuda", dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert _is_right(gemm(rows, weight, None, torch.bfloat16), rows, weight)
    assert len(caplog.records) == 1 and "as torch chooses" in caplog.text
    biased = gemm(rows, weight, bias, torch.bfloat16)
    torch.testing.assert_close(biased, torch.nn.functional.linear(rows, weight, bias))
    columns = _matrix(Product("bfloat16", 512, 512), 16)[:, ::2]  # not contiguous
    assert _is_right(gemm(columns, weight, None, torch.bfloat16), columns, weight)


def test_a_table_is_measured_and_added_to(tmp_path, capsys, monkeypatch) -> None:
    from longshore_server.native.gemm import tuning
    from longshore_server.native.gemm.plans import read_plans
    from longshore_server.native.gemm_plans_cli import main

    table = tmp_path / "table.json"
    monkeypatch.setattr(tuning, "LAST_ROWS", (8, 96, 384))  # 8 rows are left to our own kernel
    for dtype in ("bfloat16", "float8_e4m3fn"):
        assert main(["--product", f"{dtype}:2048x1024", "--out", str(table)]) == 0
    assert capsys.readouterr().out.count(" rows: torch ") == 4
    plans = read_plans(table)
    assert set(plans.products) <= {Product(each, 2048, 1024) for each in ("bfloat16", "float8_e4m3fn")}
    assert plans.device_name == torch.cuda.get_device_name() and plans.cublaslt_version == _lt().version
