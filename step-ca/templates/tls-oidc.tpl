{{- /*
TLS certificates for people who logged in (OIDC). The common name is the e-mail
address, which a policy of names can judge, and not the provider's subject.
Admins (OIDC_ADMINS, by address or group) get the names of their request.
Values as in tls-leaf.tpl, and:
  .Token     the claims of the identity token
  .Admins    OIDC_ADMINS
  .TrustEmail    the provider has only addresses of its own and does not say so in email_verified
*/ -}}
{{- $email := .Token.email | default "" -}}
{{- /* Without an address a token would pass OIDC_DOMAIN unseen, and step-ca takes what
looks like a host or a URI for one. */ -}}
{{- if not (regexMatch "^[^@:/ ]+@[^@:/ ]+$" $email) }}
  {{- fail "the identity token has no e-mail address; ask for the scope email" }}
{{- end -}}
{{- if not (or (eq "true" (toString .Token.email_verified)) (and .TrustEmail (not (hasKey .Token "email_verified")))) }}
  {{- fail "the OpenID provider does not say that this e-mail address is verified" }}
{{- end -}}
{{- /* step-ca ignores the case of the domain, and only of the domain. */ -}}
{{- $parts := splitList "@" $email -}}
{{- $admin := has (printf "%s@%s" (first $parts) (lower (last $parts))) (.Admins | default list) -}}
{{- range .Token.groups }}
  {{- if has . ($.Admins | default list) }}{{ $admin = true }}{{ end }}
{{- end -}}
{{- $subject := dict "commonName" $email -}}
{{- $dns := list -}}
{{- if $admin }}
  {{- $subject = fromJson (toJson .Insecure.CR.Subject) }}
  {{- $dns = .Insecure.CR.DNSNames }}
  {{- if not .Wildcards }}
    {{- range append $dns .Insecure.CR.Subject.CommonName }}
      {{- if hasPrefix "*." . }}{{ fail "certificates for wildcards are switched off (POLICY_WILDCARDS)" }}{{ end }}
    {{- end }}
  {{- end }}
{{- end -}}
{{- if and .Organization (not $subject.organization) }}{{ $_ := set $subject "organization" .Organization }}{{ end -}}
{
  "subject": {{ toJson $subject }},
{{- if $admin }}
  "dnsNames": {{ toJson $dns }},
  "emailAddresses": {{ toJson .Insecure.CR.EmailAddresses }},
  "ipAddresses": {{ toJson .Insecure.CR.IPAddresses }},
  "uris": {{ toJson .Insecure.CR.URIs }},
{{- else }}
  "sans": {{ toJson .SANs }},
{{- end }}
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
