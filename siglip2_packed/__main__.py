"""`python -m siglip2_packed` is `siglip2-packed`."""

import sys

from siglip2_packed.cli import main

sys.exit(main())
