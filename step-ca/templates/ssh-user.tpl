{{- /*
SSH certificates for people who logged in (OIDC). The principals are those that
step-ca takes from the e-mail address, and "group-NAME" for every group of the
identity token. NAME is the group's name as it is; groups with anything else in
their name than letters, digits, dots, dashes and underscores are left out. The
prefix keeps a group from being an account by accident: a group "root" lets nobody
log in as root. An address cannot be taken for a group: principals from it that
begin with the prefix are left out.
Admins (OIDC_ADMINS, by address or group) get what they request and their
groups, and host certificates as they request them. Values:
  .KeyID, .Principals, .Extensions, .CriticalOptions    what step-ca proposes
  .Token     the claims of the identity token
  .Admins    OIDC_ADMINS
  .TrustEmail    the provider has only addresses of its own and does not say so in email_verified
"make check" finds mistakes in it.
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
{{- $own := list -}}
{{- range .Principals }}
  {{- if or (contains "@" .) (not (hasPrefix "group-" .)) }}{{ $own = append $own . }}{{ end }}
{{- end -}}
{{- $groups := list -}}
{{- range .Token.groups }}
  {{- if has . ($.Admins | default list) }}{{ $admin = true }}{{ end }}
  {{- if regexMatch `^[A-Za-z0-9._-]+$` . }}{{ $groups = append $groups (printf "group-%s" .) }}{{ end }}
{{- end -}}
{{- if and $admin (eq .Insecure.CR.Type "host") -}}
{
  "type": "host",
  "keyId": {{ toJson .Insecure.CR.KeyID }},
  "principals": {{ toJson .Insecure.CR.Principals }}
}
{{- else -}}
{
  "type": "user",
{{- if $admin }}
  "keyId": {{ toJson .Insecure.CR.KeyID }},
  "principals": {{ toJson (uniq (concat .Insecure.CR.Principals $groups)) }},
{{- else }}
  "keyId": {{ toJson .KeyID }},
  "principals": {{ toJson (concat $own $groups) }},
{{- end }}
  "extensions": {{ toJson .Extensions }},
  "criticalOptions": {{ toJson .CriticalOptions }}
}
{{- end }}
