"""`python -m rnnfast`: versions, devices, backends and cache folders of this installation."""

import argparse

from rnnfast.explain import environment

if __name__ == "__main__":
    about = "Print versions, devices, backends and cache folders of this installation."
    argparse.ArgumentParser(prog="python -m rnnfast", description=about).parse_args()
    print(environment())
