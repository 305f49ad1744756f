"""Some dozens of the files of tests/fuzz.py, whose long form has thousands: each is read right, replaced or refused."""
import collections

import pytest

import fuzz


@pytest.mark.skipif(not fuzz.os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_no_bad_file_does_harm(tmp_path):
    cases = [case for case in fuzz.all_cases(300) if case[1] < 20 or case[0] == "json"]  # of which every task has its own
    results = list(fuzz.run_cases(7, cases, str(tmp_path)))
    assert [result for result in results if result[3]] == [] and [result[:2] for result in results] == cases
    outcomes = collections.Counter(outcome for _, _, outcome, *_ in results)
    assert min(outcomes[name] for name in ("good", "replaced", "refused")) > 10, outcomes


def test_no_bad_file_does_harm_to_a_command(tmp_path):
    assert [problem for _, problem, _ in fuzz.run_commands(str(tmp_path)) if problem] == []


def test_what_is_wrong_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.data, "turn_size", lambda image, size: size)
    monkeypatch.setattr(fuzz.data.ImageOps, "exif_transpose", lambda image, in_place: None)
    cases = [("jpeg", number) for number in range(20)]
    assert any("instead of" in result[3] for result in fuzz.run_cases(7, cases, str(tmp_path)) if result[3])
