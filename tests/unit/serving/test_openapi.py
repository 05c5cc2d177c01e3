"""What the OpenAPI document says and what the routes do, held together by schemathesis.

Every check of its own but one: valid by the schema is not valid to us, since whether a model's name is known, a picture
decodes or a text fits is no matter of a schema.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from pefomed_ray.config import ServeConfig
from tests.served_stub import KEY, png, stub_api

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402
from schemathesis.core.failures import FailureGroup, ServerError  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

HEADERS = {"Authorization": f"Bearer {KEY}"}
CASES = 400
"""Of each route that takes anything: five do, which makes 2,000."""
PICTURES = ("image/png", "image/jpeg", "application/dicom")

app = stub_api(config=ServeConfig(show_api=True, max_body_bytes=200_000, max_new_tokens=64))
schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)


@schemathesis.serializer(*PICTURES)
def as_file(context: Any, value: Any) -> dict[str, Any]:
    """A body that is a file: whatever bytes were drawn, each third one behind a PNG's."""
    data = value if isinstance(value, bytes) else str(value).encode()
    return {"data": png() + data if len(data) % 3 == 0 else data}


seen: list[str] = []
"""Routes, once for each case."""


def answers_as_it_says(case: Any) -> None:
    seen.append(case.operation.label)
    case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])


def few(cases: int) -> Any:
    return settings(
        max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


@schema.parametrize()
@few(CASES // 20)
def test_a_hundred_cases(case: Any) -> None:
    answers_as_it_says(case)


@pytest.mark.long
@schema.parametrize()
@few(CASES)
def test_two_thousand_cases(case: Any) -> None:
    answers_as_it_says(case)


@pytest.mark.long
def test_there_were_two_thousand() -> None:
    assert len(seen) >= 2000, {label: seen.count(label) for label in set(seen)}


def test_a_route_that_breaks_its_word_would_be_found() -> None:
    """The control."""
    load_all_checks()
    assert len(CHECKS.get_all()) > 5
    broken = stub_api(config=ServeConfig(show_api=True))

    @broken.get("/v1/broken", response_model=int)
    async def broken_route() -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"not": "a number"}, 500)

    found = schemathesis.openapi.from_asgi("/openapi.json", broken, headers=HEADERS)
    case = found["/v1/broken"]["GET"].Case()
    with pytest.raises(FailureGroup) as found_it:
        case.call_and_validate(headers=HEADERS)
    assert any(isinstance(failure, ServerError) for failure in found_it.value.exceptions)
