"""The structures that kernels.c is called with, and the functions' types. Each mirrors the C declaration."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p

FLOAT32, BFLOAT16 = 0, 1  # how weights are stored


class Matrix(Structure):
    _fields_ = [
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("num_in", c_int64),
        ("num_out", c_int64),
        ("kind", c_int64),
    ]


class Layer(Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
        ("scale", c_double),
    ]


class Model(Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("eps", c_double),
        ("qk_eps", c_double),
        ("layers", POINTER(Layer)),
        ("embedding", c_void_p),
        ("embedding_kind", c_int64),
        ("final_norm", c_void_p),
        ("head", Matrix),
    ]


class Step(Structure):
    _fields_ = [
        ("num_rows", c_int64),
        ("num_samples", c_int64),
        ("num_threads", c_int64),
        ("max_context", c_int64),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("blocks", c_void_p),
        ("samples", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("features", c_void_p),
        ("scratch", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Gives the library's functions their types."""
    library.packed_words.argtypes = [c_int64, c_int64, c_int64]
    library.packed_words.restype = c_int64
    library.pack_matrix.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    library.pack_matrix.restype = None
    library.scratch_floats.argtypes = [POINTER(Model), POINTER(Step)]
    library.scratch_floats.restype = c_int64
    library.run_step.argtypes = [POINTER(Model), POINTER(Step)]
    library.run_step.restype = None
    library.multiply_rows.argtypes = [POINTER(Matrix), c_void_p, c_void_p, c_int64]
    library.multiply_rows.restype = None
