"""`python -m longshore_server.native.gemm_plans_cli`: a table of a model's fastest products on this GPU.

An engine takes it from the model's folder. For shapes and GPUs without a table torch asks the library, whose
first guess is a few percent slower. It takes about two seconds for each product and number of rows; nothing
else should run on the GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longshore_server.native.bench.command import BUILT_IN_MODELS
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, ModelLoadError, NativeEngineError
from longshore_server.native.gemm.plans import DTYPES, FILE_NAME, Plans, Product, read_plans

if TYPE_CHECKING:
    from longshore_server.native.gemm.tuning import Tuned


def main(argv: Sequence[str] | None = None) -> int:
    """2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="gemm_plans_cli", description="The fastest products on this GPU.")
    flag = parser.add_argument
    flag("--model", help="a model folder, or llama-8b or llama-70b")
    flag("--quantization", default="none", help="form of the weights, as they will be served")
    flag("--product", action="append", default=[], metavar="DTYPE:OUTxIN", help="a product, a rank's say")
    flag("--device", default="cuda", help="cuda or cuda:N")
    flag("--out", type=Path, help="the table, which is added to; without it the one in the model's folder")
    try:
        return _run(parser.parse_args(argv))
    except NativeEngineError as error:
        print(f"gemm_plans_cli: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    import torch

    products = [_product(text) for text in arguments.product]
    if arguments.model is not None:
        products += [each for each in _products_of(arguments) if each not in products]
    if not products:
        raise ConfigError("model", "give a model or a product")
    if arguments.out is None and (arguments.model is None or arguments.model in BUILT_IN_MODELS):
        raise ConfigError("out", "must name a file where no model folder is given")
    device = torch.device(arguments.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError("device", f"{arguments.device} is no GPU that is here")
    return _tune(products, device.index or 0, arguments.out or Path(arguments.model) / FILE_NAME)


def _tune(products: list[Product], device_index: int, path: Path) -> int:
    import torch

    from longshore_server.native.gemm import tuning
    from longshore_server.native.gemm.cublaslt import cublaslt_of

    device = torch.device("cuda", device_index)
    torch.cuda.set_device(device)
    lt = cublaslt_of(device)
    plans = Plans(torch.cuda.get_device_name(device), lt.version)
    if path.is_file():
        there = read_plans(path)
        if (there.device_name, there.cublaslt_version) != (plans.device_name, plans.cublaslt_version):
            words = f"is of {there.device_name} and cuBLASLt {there.cublaslt_version}"
            raise ModelLoadError(f"{path} {words}, this is {plans.device_name} and {plans.cublaslt_version}")
        plans = there
    for product in products:
        print(f"{product.dtype} {product.num_outputs} x {product.width}", flush=True)
        with torch.inference_mode():
            tuner = tuning.ProductTuner(lt, product, device, tuning.LAST_ROWS[-1])
            results = []
            for result in tuner.tune(tuning.LAST_ROWS):
                print(_line_of(result), flush=True)
                results.append(result)
        plans.products[product] = tuning.plans_of(results)
        plans.write(path)
        del tuner
        torch.cuda.empty_cache()
    return 0


def _line_of(result: Tuned) -> str:
    gain = 100 * (1 - result.best_us / result.torch_us)
    words = f"best {result.best_us:9.2f} us, {gain:4.1f}% less" if result.algorithm else "stays"
    return f"  up to {result.last_row:5} rows: torch {result.torch_us:9.2f} us, {words}"


def _product(text: str) -> Product:
    dtype, _, sizes = text.partition(":")
    num_outputs, _, width = sizes.partition("x")
    is_sized = num_outputs.isdecimal() and width.isdecimal() and int(num_outputs) * int(width) > 0
    if dtype not in DTYPES or not is_sized or int(num_outputs) % 16 or int(width) % 16:
        words = f"{text!r} is not a type of {', '.join(DTYPES)} and OUTxIN, both multiples of 16"
        raise ConfigError("product", words)
    return Product(dtype, int(num_outputs), int(width))


def _products_of(arguments: argparse.Namespace) -> list[Product]:
    """The products of a fused model, found in its shapes; no weight is read."""
    from longshore_server.native.bench.models import write_config
    from longshore_server.native.model.load import products_of

    with tempfile.TemporaryDirectory(prefix="longshore-gemm-") as folder:
        model = arguments.model
        if model in BUILT_IN_MODELS:
            model = str(write_config(model, Path(folder)))
        config = EngineConfig(
            model=model,
            load_format="random",
            device=arguments.device,
            quantization=arguments.quantization,
        )
        products = products_of(config)
    if not products:
        raise ConfigError("model", f"{arguments.model} has no layers that are fused")
    return products


if __name__ == "__main__":
    sys.exit(main())
