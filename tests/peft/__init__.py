"""The methods inside PEFT."""
