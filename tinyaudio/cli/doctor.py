"""The `doctor` command: what this machine can do."""

import json
import sys
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check what this machine can do, one line each, with remedies. Exits 1 if something will fail."""
    from dataclasses import asdict

    from tinyaudio.doctor import examine

    findings = list(examine())
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            remedy = f"  -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.state:4}  {finding.name}: {finding.found}{remedy}")
    sys.exit(1 if any(finding.state == "bad" for finding in findings) else 0)
