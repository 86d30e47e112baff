"""Functions by name or by path."""

import pytest

from vla_opd.plugins import named_function


def test_functions_by_name_or_by_path() -> None:
    assert named_function("length", {"length": len}, "policy.family") is len
    join = named_function("os.path:join", {}, "policy.family")
    assert join("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "size",
            (
                r"policy\.family is 'size'; "
                r"expected one of \['length'\] or \"package\.module:function\""
            ),
        ),
        ("no_such_package:f", r"policy\.family is 'no_such_package:f': No module named"),
        ("math:no_such_function", r"policy\.family is 'math:no_such_function': .*no attribute"),
    ],
)
def test_functions_that_do_not_exist_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_function(name, {"length": len}, "policy.family")
