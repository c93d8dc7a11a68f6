{{- /*
TLS certificates whose names the provisioner has checked: admin and acme.
A Go template of step-ca. Its values:
  .Subject.CommonName, .SANs         the checked names
  .Insecure.CR                       the request: only its key is used here
  .Organization, .CRL, .Wildcards    TLS_ORGANIZATION, the address of the CRL, POLICY_WILDCARDS
"make check" finds mistakes in it.
*/ -}}
{{- if not .Wildcards }}
  {{- if hasPrefix "*." .Subject.CommonName }}{{ fail "certificates for wildcards are switched off (POLICY_WILDCARDS)" }}{{ end }}
  {{- range .SANs }}
    {{- if hasPrefix "*." .Value }}{{ fail "certificates for wildcards are switched off (POLICY_WILDCARDS)" }}{{ end }}
  {{- end }}
{{- end -}}
{
  "subject": {
    {{- with .Organization }}
    "organization": {{ toJson . }},
    {{- end }}
    "commonName": {{ toJson .Subject.CommonName }}
  },
  "sans": {{ toJson .SANs }},
{{- with .CRL }}
  "crlDistributionPoints": {{ toJson . }},
{{- end }}
{{- if typeIs "*rsa.PublicKey" .Insecure.CR.PublicKey }}
  "keyUsage": ["keyEncipherment", "digitalSignature"],
{{- else }}
  "keyUsage": ["digitalSignature"],
{{- end }}
  "extKeyUsage": ["serverAuth", "clientAuth"]
}
