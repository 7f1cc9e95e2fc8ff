"""Who may change what: by the command line, by where the page is served, and by where a request comes from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import app
from flora.errors import RequestError
from profiling.dashboard.policy import EVERYTHING, PermissionRefused, Policy, Visitor, is_loopback
from profiling.options import ELSEWHERE, RIGHTS


def request(address="127.0.0.1", **headers):
    client = None if address is None else SimpleNamespace(host=address)
    return SimpleNamespace(
        session_hash="s", client=client, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_whoever_sits_at_the_machine_may_do_everything(host):
    policy = Policy.of_command_line(None, host)
    assert policy.visitor(request()).rights == EVERYTHING == policy.widest
    policy.visitor(request("::1")).require("models")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "flora.example", "", "localhost.evil.example"])
def test_on_a_page_that_others_reach_nobody_may_more_than_upload(host):
    policy = Policy.of_command_line(None, host)
    assert policy.visitor(request()).rights == policy.widest == ELSEWHERE and not is_loopback(host)


@pytest.mark.parametrize(
    "one",
    [
        request(x_forwarded_for="127.0.0.1"), request(forwarded="for=127.0.0.1"), request(x_real_ip="127.0.0.1"),
        request(x_forwarded_host="flora.example"), request(via="1.1 proxy"), request("10.0.0.7"), request(None),
        request("testclient"),
    ],
)  # fmt: skip
def test_what_comes_through_a_proxy_is_somebody_elses(one):
    assert Policy.of_command_line(None, "127.0.0.1").visitor(one).rights == ELSEWHERE


@pytest.mark.parametrize(
    ("words", "rights"),
    [(["none"], set()), (["all"], set(RIGHTS)), (["hub", "upload"], {"hub", "upload"}), (["models", "models"], {"models"})],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_line_says_it_for_everybody(words, rights, host):
    policy = Policy.of_command_line(app.parser().parse_args(["--allow", *words]).allow, host)
    for one in (request(), request("8.8.8.8", x_forwarded_for="1.1.1.1")):
        assert policy.visitor(one).rights == policy.widest == rights


def test_a_command_line_that_makes_no_sense(capsys):
    with pytest.raises(RequestError, match="--allow"):
        Policy.of_command_line(["none", "hub"], "127.0.0.1")
    with pytest.raises(SystemExit, match="2"):
        app.parser().parse_args(["--allow", "everything"])
    assert "--allow" in capsys.readouterr().err


def test_a_refusal_says_what_is_off_and_how_it_is_switched_on():
    visitor = Visitor("s", frozenset({"hub"}))
    visitor.require("hub")
    with pytest.raises(PermissionRefused, match="loading another model for everybody is switched off here.*--allow models"):
        visitor.require("models")
    assert set(visitor.refusals) == set(RIGHTS) - {"hub"} and visitor.ordered == ["hub"]
