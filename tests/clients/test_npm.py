"""`node-sd-webui`, a client of A1111's API from npm, against the running server; `make` installs it where there is npm."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.support.server import ROOT, Live

PLACES = [Path(os.environ.get("HIRES_TEST_NPM", "")), ROOT / ".venv" / "npm" / "node_modules"]
PACKAGES = next((place for place in PLACES if (place / "node-sd-webui").is_dir()), None)
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None or PACKAGES is None, reason="no Node.js, or node-sd-webui is not installed")

SCRIPT = """
const { default: sdwebui } = require('node-sd-webui');
(async () => {
  const client = sdwebui({ apiUrl: process.argv[1] });
  const wanted = { prompt: 'a lake', seed: 3, steps: 2, height: 72 };
  const first = await client.txt2img({ ...wanted, negativePrompt: 'fog', width: 96, cfgScale: 2 });
  const second = await client.img2img({ ...wanted, imageData: first.images, width: 120 });
  const told = await client.pngInfo({ imageData: first.images[0] });
  console.log(JSON.stringify({ first: first.images, second: second.images, info: JSON.parse(first.info), told }));
})();
"""


def test_the_npm_client_draws_redraws_and_reads(server: Live) -> None:
    command, places = [str(NODE), "-e", SCRIPT, server.url], os.environ | {"NODE_PATH": str(PACKAGES)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=places)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    sizes = [Image.open(io.BytesIO(base64.b64decode(found[name][0]))).size for name in ("first", "second")]
    assert sizes == [(96, 72), (120, 72)]
    assert found["info"]["seed"] == 3
    told = found["told"]
    assert (told["prompt"], told["negativePrompt"], told["steps"], told["seed"]) == ("a lake", "fog", 2, 3)
    assert (told["width"], told["height"], told["cfgScale"], told["samplingMethod"]) == (96, 72, 2, "Euler a")
