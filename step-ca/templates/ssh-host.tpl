{{- /*
SSH host certificates from one-time tokens of ssh-host-jwk. The first line is
what keeps its key from people's certificates, and "make check" demands it.
Values: .Type, .KeyID and .Principals, as the token says.
*/ -}}
{{- if ne .Type "host" }}{{ fail "ssh-host-jwk gives SSH host certificates only" }}{{ end -}}
{
  "type": "host",
  "keyId": {{ toJson .KeyID }},
  "principals": {{ toJson .Principals }}
}
