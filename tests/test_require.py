"""A module that is missing fails a test file where SPARSE_ATTENTION_REQUIRE asks for it."""

import pytest
from require import import_or_skip


@pytest.mark.parametrize(
    "required, outcome",
    [
        ("", pytest.skip.Exception),
        ("gpu", ModuleNotFoundError),
        ("tf,2gpu", ModuleNotFoundError),
    ],
)
def test_missing_modules_skip_or_fail(monkeypatch, required, outcome):
    monkeypatch.setenv("SPARSE_ATTENTION_REQUIRE", required)
    with pytest.raises((pytest.skip.Exception, ImportError)) as caught:
        import_or_skip("no_such_module")
    assert caught.type is outcome
