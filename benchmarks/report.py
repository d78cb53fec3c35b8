"""stub"""


def write(results, folder):
    pass
