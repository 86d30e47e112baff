"""The schema of the flow's parameter `settings`."""

import pytest
from pydantic import TypeAdapter

from flows.parameters import Settings


@pytest.mark.parametrize("objective", ["jsd", {"name": "jsd"}])
def test_an_objective_is_given_by_its_name_or_with_options(objective: object) -> None:
    changes = TypeAdapter(Settings).validate_python({"optimize.objective": objective})
    assert changes == {"optimize.objective": {"name": "jsd"}}
