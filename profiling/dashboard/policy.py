"""What a visitor may change, decided here and asked by every handler: a hidden button is no protection.

Nobody may do anything but look and run unless the command line or the place where the page is served says so. A page on a loopback
address is its owner's own; what comes to it through a proxy is somebody else's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora.errors import RequestError
from profiling.options import ELSEWHERE, RIGHTS

EVERYTHING = frozenset(RIGHTS)
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class PermissionRefused(RequestError):
    """Something that a visitor may not do here."""


@dataclass(frozen=True)
class Visitor:
    """Who asks. session: the browser's or the client's, None for a program without one."""

    session: str | None
    rights: frozenset[str]

    def require(self, right: str) -> None:
        """PermissionRefused, with the way to switch it on, where the visitor has not the right."""
        if right not in self.rights:
            raise PermissionRefused(f"{RIGHTS[right]} is switched off here: whoever runs this page allows it with --allow {right}")

    @property
    def ordered(self) -> list[str]:
        """The visitor's rights in the order of `RIGHTS`."""
        return [right for right in RIGHTS if right in self.rights]

    @property
    def refusals(self) -> dict[str, str]:
        """right → what it is in words, of those that the visitor has not."""
        return {right: words for right, words in RIGHTS.items() if right not in self.rights}


@dataclass(frozen=True)
class Policy:
    """allowed: everybody's rights; None: everything for whoever sits at this machine, uploads for all others.

    loopback: whether the page is served where only this machine reaches it.
    """

    allowed: frozenset[str] | None = None
    loopback: bool = False

    @classmethod
    def of_command_line(cls, words: Sequence[str] | None, host: str) -> Policy:
        """words: of --allow, names of rights, "all" or "none"; None where it was not given. RequestError for what contradicts."""
        if words is None:
            return cls(None, is_loopback(host))
        if {"all", "none"} & set(words) and len(set(words)) > 1:
            raise RequestError(f"--allow takes any of {', '.join(RIGHTS)}, or all, or none: not {' '.join(words)}")
        return cls(EVERYTHING if "all" in words else frozenset(words) - {"none"}, is_loopback(host))

    def visitor(self, request: Any) -> Visitor:
        """Who sends a request; it is gradio's, with its session, headers and the address that it came from."""
        return Visitor(request.session_hash, self._rights(request))

    @property
    def widest(self) -> frozenset[str]:
        """What any visitor at all may do."""
        return self.allowed if self.allowed is not None else EVERYTHING if self.loopback else ELSEWHERE

    def _rights(self, request: Any) -> frozenset[str]:
        if self.allowed is not None:
            return self.allowed
        headers: Mapping[str, str] | Collection[str] = request.headers
        came_directly = not any(name in headers for name in _FORWARDED)
        address = request.client.host if request.client is not None else ""
        return EVERYTHING if self.loopback and came_directly and is_loopback(address or "") else ELSEWHERE


def is_loopback(host: str) -> bool:
    """Whether an address is one that only its own machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
