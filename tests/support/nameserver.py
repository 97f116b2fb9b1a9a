"""A name server on loopback, with the names that a test gives it."""

from __future__ import annotations

import socket
import threading
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.rrset


class NameServer:
    """Answers from `zone`, (name, type) to texts; SERVFAIL for the `failing` names.

    The `refusing` ones get REFUSED, as from a lame server, and the `silent` ones no answer.
    """

    def __init__(
        self,
        zone: dict[tuple[str, str], list[str]],
        failing: set[str],
        *,
        refusing: frozenset[str] = frozenset(),
        silent: frozenset[str] = frozenset(),
    ) -> None:
        self._zone = zone
        self._failing = failing
        self._refusing = refusing
        self._silent = silent
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.resolver = dns.resolver.Resolver(configure=False)
        self.resolver.nameservers = ["127.0.0.1"]
        self.resolver.port = self._socket.getsockname()[1]
        self.resolver.lifetime = 2

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            octets, client = self._socket.recvfrom(4096)
            if not octets:
                return
            query = dns.message.from_wire(octets)
            self.asked.append(query.question[0].name.to_text())
            if self.asked[-1] not in self._silent:
                self._socket.sendto(self._answer(query).to_wire(), client)

    def _answer(self, query: dns.message.Message) -> dns.message.Message:
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.RA
        question = query.question[0]
        name, kind = question.name.to_text(), dns.rdatatype.to_text(question.rdtype)
        if name in self._failing:
            reply.set_rcode(dns.rcode.SERVFAIL)
            return reply
        if name in self._refusing:
            reply.set_rcode(dns.rcode.REFUSED)
            return reply
        for _ in range(3):
            target = self._zone.get((name, "CNAME"))
            if target is None:
                break
            reply.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", *target))
            name = target[0]
        if rows := self._zone.get((name, kind)):
            reply.answer.append(dns.rrset.from_text(name, 60, "IN", kind, *rows))
        elif name not in {each for each, _ in self._zone}:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply
