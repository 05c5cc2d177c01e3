"""`python -m pefomed_ray`."""

from pefomed_ray.cli.main import main

main()
