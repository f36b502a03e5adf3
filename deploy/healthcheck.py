"""The container's health check: exit status 0 if this replica is ready (`server/health.py`)."""

from __future__ import annotations

import http.client
import sys

PORT = 8083
TIMEOUT_S = 8.0  # Less than the HEALTHCHECK's own.


def main() -> int:
    """Ask once; print the response."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        print(response.status, response.read(500).decode("utf-8", "replace").strip())
    except (OSError, http.client.HTTPException) as error:
        print(error)
        return 1
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
