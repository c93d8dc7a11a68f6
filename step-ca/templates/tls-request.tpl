{{- /*
TLS certificates whose names are those of the request, which nobody has checked:
k8s-sa, where whoever has a service account's token is trusted with any name.
Values as in tls-leaf.tpl.
*/ -}}
{{- if not .Wildcards }}
  {{- range append .Insecure.CR.DNSNames .Insecure.CR.Subject.CommonName }}
    {{- if hasPrefix "*." . }}{{ fail "certificates for wildcards are switched off (POLICY_WILDCARDS)" }}{{ end }}
  {{- end }}
{{- end -}}
{{- $subject := fromJson (toJson .Insecure.CR.Subject) -}}
{{- if and .Organization (not $subject.organization) }}{{ $_ := set $subject "organization" .Organization }}{{ end -}}
{
  "subject": {{ toJson $subject }},
  "dnsNames": {{ toJson .Insecure.CR.DNSNames }},
  "emailAddresses": {{ toJson .Insecure.CR.EmailAddresses }},
  "ipAddresses": {{ toJson .Insecure.CR.IPAddresses }},
  "uris": {{ toJson .Insecure.CR.URIs }},
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
