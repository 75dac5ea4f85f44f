"""What a host answers when it is asked for its way to another."""


def route(source: str, *interfaces: str, address: str = "10.0.0.9") -> dict:
    return {"address": address, "source": source, "interfaces": list(interfaces)}
