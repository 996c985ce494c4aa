from fairserve.client import Connection as Connection
from fairserve.client import connect as connect

__version__: str
