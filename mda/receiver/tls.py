"""TLS on the channel to the client (RFC 3207), by octets in and octets out.

Loaded only where a client asks for it: `ssl` costs more than the rest of the start.
"""

from __future__ import annotations

import ssl

_READ = 65_536


class Tls:
    """One channel's TLS; raises OSError (ssl.SSLError) for what is no TLS, or not ours.

    The certificate and its key are read anew for each channel, so that renewed ones count.
    """

    def __init__(self, certificate: str, key: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.load_cert_chain(certificate, key or None)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._channel = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def shake_hands(self) -> bool:
        """Go on with the handshake, as far as the octets that are there lead; is it done?"""
        try:
            self._channel.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def feed(self, octets: bytes) -> None:
        """Take what has come over the channel."""
        self._incoming.write(octets)

    def take_output(self) -> bytes:
        """What is to go over the channel now."""
        return self._outgoing.read()

    def encrypt(self, text: bytes) -> bytes:
        """What `text` is on the channel."""
        if text:
            self._channel.write(text)
        return self._outgoing.read()

    def decrypt(self) -> tuple[bytes, bool]:
        """All that the client has said so far, and whether it has said that it is done."""
        text = bytearray()
        try:
            while octets := self._channel.read(_READ):
                text += octets
        except ssl.SSLWantReadError:
            return bytes(text), False
        except ssl.SSLZeroReturnError:
            pass
        return bytes(text), True
