"""`python -m rnnfast`: versions, devices, backends and cache folders of this installation."""

from rnnfast.report import environment

if __name__ == "__main__":
    print(environment())
