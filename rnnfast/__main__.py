"""`python -m rnnfast`: versions, devices, backends and cache folders of this installation."""

from rnnfast.explain import environment

if __name__ == "__main__":
    print(environment())
