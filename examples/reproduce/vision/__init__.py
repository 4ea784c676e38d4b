"""CLIP's vision towers on up to twenty image classification tasks: Tables 1, 2 and 9."""
