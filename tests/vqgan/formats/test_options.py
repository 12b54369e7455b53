"""Settings that no public file has come from conf/quantizer, as a command composes them."""

import pytest

from tests.helpers.configs import compose_plain
from vqgan.formats.options import read_quantizer


@pytest.mark.parametrize("option", ["vq", "ema", "gumbel", "ibq", "lfq"])
def test_a_quantizers_settings_are_those_of_the_command(option: str) -> None:
    settings = compose_plain("stage=vqgan", f"quantizer={option}", "quantizer.K=16")["quantizer"]
    assert read_quantizer(option, K=16) == settings


def test_a_setting_that_the_option_does_not_have_is_a_bug() -> None:
    with pytest.raises(KeyError, match="conf/quantizer/vq.yaml has no score"):
        read_quantizer("vq", K=16, score="nearest")
