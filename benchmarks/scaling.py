def block(found):
    return ""
