"""Activations for training on a Linux CPU, where MLX computes exp and tanh one number at a time.

They are rational approximations, within 1e-3, whose derivatives are written out; training takes less than half the
time. The trained model is then run with the exact functions.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

_A, _B = 0.7978845608, 0.044715  # sqrt(2/pi) and the cubic term of tanh-GELU


def use_fast_activations() -> None:
    """Put them in the place of the exact ones for the rest of this process."""
    nn.gelu_approx = gelu
    llama.swiglu = swiglu


def _tanh(u: mx.array) -> mx.array:
    """The seventh convergent of tanh's continued fraction."""
    u = mx.clip(u, -4.9, 4.9)
    s = u * u
    return u * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))


@mx.compile
def _gelu_forward(x):
    return 0.5 * x * (1 + _tanh(_A * (x + _B * x * x * x)))


@mx.compile
def _gelu_backward(x, g):
    t = _tanh(_A * (x + _B * x * x * x))
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _A * (1 + 3 * _B * x * x))


@mx.compile
def _swiglu_forward(gate, x):
    return 0.5 * gate * (1 + _tanh(0.5 * gate)) * x


@mx.compile
def _swiglu_backward(gate, x, g):
    s = 0.5 * (1 + _tanh(0.5 * gate))
    return g * x * s * (1 + gate * (1 - s)), g * gate * s


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
