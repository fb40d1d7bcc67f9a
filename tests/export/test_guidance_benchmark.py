import json

import guidance
from ldm_runtime.testing import write_tiny_bundle


def test_the_benchmark_prints_one_line_with_a_row_for_each_use_of_guidance(tmp_path, capsys):
    write_tiny_bundle(tmp_path)

    code = guidance.main(["--bundle", str(tmp_path), "--steps", "4", "--repetitions", "3"])

    line = json.loads(capsys.readouterr().out)
    names = ["everywhere", "half of the steps", "nowhere"]
    assert code == 0
    assert [row["name"] for row in line["rows"]] == [f"unet, guidance {name}" for name in names]
    assert all(len(row["seconds"]) == 3 for row in line["rows"])
    assert line["share_of_everywhere"]["unet, guidance everywhere"] == 1
