"""The probe container's health check: exit status 0 if the probe's last result was right on every transport.

Apart from probe.py, since importing the client every few seconds would cost more than probing.
"""

from __future__ import annotations

import http.client
import re
import sys

PORT = 8084
TRANSPORTS = 2
TIMEOUT_S = 4.0  # Less than the HEALTHCHECK's own.


def main() -> int:
    """Read the probe's metrics once; print the result of each transport."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        print(error)
        return 1
    results = re.findall(r'^convscope_probe_success\{transport="(\w+)"\} (\S+)', text, re.MULTILINE)
    print(results or "no result yet")
    return 0 if len(results) == TRANSPORTS and all(float(value) == 1 for _, value in results) else 1


if __name__ == "__main__":
    sys.exit(main())
