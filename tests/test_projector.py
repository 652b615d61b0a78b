"""Projectors without a reference implementation: position embeddings, dtypes, errors."""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from llama3v_mlx.models.projector import ProjectorConfig, Resampler, build_projector, sincos_2d

TINY = ProjectorConfig(hidden_size=32, vision_hidden_size=16, num_queries=3, num_attention_heads=2)


def test_position_code_is_column_then_row() -> None:
    code = np.array(sincos_2d(4, 7, 4096)).reshape(4, 7, 4096)
    row = code[3, 5]
    expected = [math.sin(5), math.cos(5), math.sin(3), math.cos(3)]
    np.testing.assert_allclose(row[[0, 1024, 2048, 3072]], expected, atol=1e-6)
    # The slowest frequency of each quarter, 10000^(-1023/1024).
    slow = 10000 ** (-1023 / 1024)
    expected = [math.sin(5 * slow), math.cos(5 * slow), math.sin(3 * slow), math.cos(3 * slow)]
    np.testing.assert_allclose(row[[1023, 2047, 3071, 4095]], expected, atol=1e-6)


def test_position_code_does_not_scale_with_the_grid() -> None:
    small, large = (np.array(sincos_2d(h, w, 64)).reshape(h, w, 64) for h, w in ((3, 4), (5, 200)))
    np.testing.assert_array_equal(large[:3, :4], small)


@pytest.mark.parametrize("projector_type, count", [("resampler", 3), ("self-attention", 6)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_output_keeps_the_dtype(
    projector_type: str, count: int, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    linear = nn.Linear.__call__

    def recording(self: nn.Linear, x: mx.array) -> mx.array:
        y = linear(self, x)
        seen.update((x.dtype, y.dtype))
        return y

    monkeypatch.setattr(nn.Linear, "__call__", recording)
    projector = build_projector(replace(TINY, projector_type=projector_type))
    projector.set_dtype(dtype)
    tokens = projector(mx.ones((2, 6, 16), dtype=dtype), (2, 3))
    assert tokens.shape == (2, count, 32)
    assert tokens.dtype == dtype
    assert seen == {dtype}


def test_grid_must_fit_the_features() -> None:
    with pytest.raises(ValueError, match="6 patch features do not form a grid of 2x4"):
        Resampler(TINY)(mx.zeros((1, 6, 16)), (2, 4))


def test_same_features_differ_on_another_grid() -> None:
    mx.random.seed(0)
    resampler = Resampler(TINY)
    resampler.query = mx.random.normal(resampler.query.shape)
    features = mx.random.normal((1, 6, 16))
    tall, wide = resampler(features, (3, 2)), resampler(features, (2, 3))
    assert not mx.allclose(tall, wide, atol=1e-4)


def test_unknown_projector_is_named() -> None:
    with pytest.raises(ValueError, match="unknown projector_type 'mlp'"):
        build_projector(ProjectorConfig(projector_type="mlp"))
