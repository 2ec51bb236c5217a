"""/openapi.json is a promise: whatever it allows gets a documented answer of the documented shape, and never a 5xx.

Data that the schema forbids is sent too, and has to be refused in a documented way.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


EXAMPLES = 200 if "WARPLOOM_SLOW" in os.environ else 10  # for each route


@pytest.mark.timeout(30 * EXAMPLES)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_whatever_is_sent_gets_a_documented_answer(server, mode):
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi

    kinds = ("status_code", "content_type", "response_schema")
    promises = [checks.not_a_server_error, *(getattr(openapi, f"{kind}_conformance") for kind in kinds)]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "negative" and operation.method == "get":
            continue

        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def keeps_its_promise(case):
            case.call_and_validate(checks=promises, timeout=60)

        keeps_its_promise()
    server.assert_nothing_left()
