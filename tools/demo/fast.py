"""Activations for training on a Linux CPU, where MLX computes exp and tanh one number at a time.

They are within 1e-4 of the exact ones, free of branches and calls so that a compiler vectorizes them, with their
derivatives written out. The trained model is run with the exact functions.
"""

import mlx.core as mx
from mlx_lm.models import llama

from llama3v_mlx.models import linux_cpu

_A, _B = 2 * 0.7978845608, 0.044715  # tanh-GELU is x·sigmoid(_A·(x + _B·x³)), with _A = 2·sqrt(2/pi)


def use_fast_activations() -> None:
    """Replace the exact activations by these for the rest of this process."""
    linux_cpu.gelu = gelu
    linux_cpu.attention = mx.fast.scaled_dot_product_attention  # whose gradient is cheaper
    llama.swiglu = swiglu


def _share(z: mx.array) -> mx.array:
    """1 / (1 + exp(z)) for z ≥ 0, with exp(z) as (1 + z/64 + (z/64)²/2)⁶⁴."""
    z = z * (1 / 64)
    e = 1 + z * (1 + 0.5 * z)
    for _ in range(6):
        e = e * e
    return 1 / (1 + e)


@mx.compile
def _gelu_forward(x):
    a = mx.abs(x)
    return 0.5 * (x + a) - a * _share(_A * a * (1 + _B * a * a))


@mx.compile
def _gelu_backward(x, g):
    a = mx.abs(x)
    r = _share(_A * a * (1 + _B * a * a))
    return g * (0.5 + mx.sign(x) * (0.5 - r + a * r * (1 - r) * _A * (1 + 3 * _B * a * a)))


@mx.compile
def _swiglu_forward(gate, x):
    a = mx.abs(gate)
    return (0.5 * (gate + a) - a * _share(a)) * x


@mx.compile
def _swiglu_backward(gate, x, g):
    a = mx.abs(gate)
    r = _share(a)
    slope = 0.5 + mx.sign(gate) * (0.5 - r + a * r * (1 - r))
    return g * x * slope, g * (0.5 * (gate + a) - a * r)


@mx.custom_function
def gelu(x):
    return _gelu_forward(x)


@gelu.vjp
def _gelu_vjp(x, g, _):
    return _gelu_backward(x, g)


@mx.custom_function
def swiglu(gate, x):
    return _swiglu_forward(gate, x)


@swiglu.vjp
def _swiglu_vjp(primals, g, _):
    return _swiglu_backward(*primals, g)
