"""What axe-core finds in a report, at the widths of a phone and a desk, light and dark.

    python tools/check_accessibility.py report.html axe.min.js

axe.min.js is in the npm package axe-core (``npm pack axe-core``); Chromium must be on the PATH.
Everything that can be unfolded is unfolded. Exit code 1 if anything is found.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
<script>{axe}</script>
<script>
addEventListener("load", async () => {{
  const folded = document.querySelectorAll("details");
  folded.forEach((each) => each.removeAttribute("name"));
  folded.forEach((each) => (each.open = true));
  const found = (await axe.run()).violations;
  const answer = document.createElement("pre");
  answer.id = "axe";
  answer.textContent = JSON.stringify(found.map((v) => [v.id, v.help, v.nodes.map((n) => n.html)]));
  document.body.append(answer);
}});
</script>
"""


def violations(page: str, axe: str, width: int, dark: bool) -> list[list]:
    """Rules that the page breaks, with what breaks them."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        probe = PROBE.format(axe=axe.replace("</script", "<\\/script"))
        path.write_text(page.replace("</body>", f"{probe}</body>"), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/x"]
        options += [f"--window-size={width},900", "--dump-dom", "--virtual-time-budget=30000"]
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        call = [chromium, *options, f"file://{path}"]
        run = subprocess.run(call, capture_output=True, text=True, check=True)
    found = re.search(r'<pre id="axe">(.*?)</pre>', run.stdout, re.S)
    if found is None:
        raise SystemExit("axe-core did not answer: is the second file axe.min.js?")
    return json.loads(html.unescape(found[1]))


def main() -> int:
    page, axe = (Path(name).read_text(encoding="utf-8") for name in sys.argv[1:3])
    count = 0
    for width in (390, 1440):
        for dark in (False, True):
            found = violations(page, axe, width, dark)
            count += len(found)
            print(f"{width} pixels, {'dark' if dark else 'light'}: {len(found)} rules broken")
            for rule, text, nodes in found:
                print(f"  {rule}: {text} ({len(nodes)}, such as {nodes[0][:100]})")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
