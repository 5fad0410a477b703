"""What `make demo` shows: a VM boots, a container runs in it, and the exit status comes back.

python -m examples.demo
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import byre
import byre_images
from examples.busybox_image import make_busybox_image


async def main() -> None:
    byre_images.ensure(progress=lambda line: print(f"  {line}", flush=True))
    with tempfile.TemporaryDirectory(prefix="byre-demo-") as folder:
        image = make_busybox_image(Path(folder) / "busybox")
        started = time.monotonic()
        async with byre.UtilityVM() as vm:
            print(f"booted a VM in {time.monotonic() - started:.1f} s; in it:")
            kernel = await vm.run(["uname", "-srm"], capture_output=True, check=True)
            print("  uname -srm      ", kernel.stdout.decode().strip())
            async with await vm.create_container(image=f"oci:{image}", args=["sleep", "infinity"]) as container:
                await container.start()
                print("started a container from an OCI image; in it:")
                result = await container.run(
                    ["sh", "-c", "id; hostname; ps; exit 3"], capture_output=True, timeout=60
                )
                for line in result.stdout.decode().splitlines():
                    print("  |", line)
                print(f"  its exit status is {result.returncode}")
                assert result.returncode == 3
        print("the VM is gone, and nothing is left behind")


if __name__ == "__main__":
    asyncio.run(main())
