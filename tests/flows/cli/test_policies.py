"""Commands on checkpoints."""

import re
from pathlib import Path

import pytest

from flows import cli
from tests.flows.toy import ROOT


def test_parity_with_the_original_is_told_array_by_array(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    golden = ROOT / "tests/data/openvla_oft"
    files = [str(golden / "checkpoint"), str(golden / "inputs.npz"), str(golden / "outputs.npz")]
    assert cli.main(["parity", *files]) == 0
    output = capsys.readouterr().out
    assert re.search(r"jpeg_decoded +0\.0e\+00 +0e\+00\n", output)
    assert re.search(r"logits_action_columns +\d\.\de-0\d +5e-04\n", output)
    assert "not compared: logits_full_argmax" in output
    assert (
        cli.main(["parity", *files, "--tolerance", "1e-9", "--out", str(tmp_path / "ours.npz")])
        == 1
    )
    assert re.search(r"vision_features +\d\.\de-0\d +1e-09 +too far\n", capsys.readouterr().out)
    assert (tmp_path / "ours.npz").exists()
    assert cli.main(["parity", *files, "--dtype", "bfloat16"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"jpeg_decoded +0\.0e\+00 +0e\+00\n", output)
    assert re.search(r"vision_features +\d\.\de[+-]\d\d +5e-04 +too far\n", output)
    assert cli.main(["parity", *files, "--device", "tpu"]) == 1
    assert (
        "device is 'tpu'; expected 'auto', 'cpu' or, where torch sees one, 'cuda'"
        in capsys.readouterr().err
    )
    assert cli.main(["parity", *files, "--unnorm-key", "none"]) == 1
    assert (
        "unnorm_key is 'none'; expected one of ['libero_spatial_no_noops']"
        in capsys.readouterr().err
    )
