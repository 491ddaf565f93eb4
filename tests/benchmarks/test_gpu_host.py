"""The host's part of a recorded call is measured on a CPU, by parts. No times."""

import gpu_host


def test_all_parts_of_each_size_are_told(capsys):
    assert gpu_host.main(["--sizes", "1x32", "3x5", "--rounds", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 x 32, us of the host: before ")
    assert second.startswith("3 x 5, us of the host: before ")
    assert all(", beside " in line and ", after " in line for line in (first, second))
