package main

import (
	"crypto/ecdsa"
	"crypto/rand"
	"html/template"
	"net/http"

	"github.com/zitadel/oidc/v3/pkg/op"
)

// Config is whom the provider knows.
type Config struct {
	Issuer  string
	People  map[string]Person // by user name
	Clients map[string]Client // by client id
}

// Person is somebody who can log in.
type Person struct {
	Password   string
	Email      string
	Unverified bool // nobody has proved that the address is theirs
	Groups     []string
}

// Client is a program that may ask who somebody is.
type Client struct {
	Secret   string // empty: a public client, which has to use PKCE
	Redirect string // of a public client: with any port (RFC 8252 section 7.3)
	Lifetime int    // of identity tokens, in seconds
}

// newProvider makes the provider. It signs with key, which must be the same one after
// a restart: who has fetched the key set keeps it (step-ca for 12 hours).
func newProvider(c Config, key *ecdsa.PrivateKey) (http.Handler, error) {
	s := &storage{Config: c, key: signingKey{key}, requests: map[string]*request{}, codes: map[string]string{}}
	options := &op.Config{CodeMethodS256: true, AuthMethodPost: true}
	if _, err := rand.Read(options.CryptoKey[:]); err != nil {
		return nil, err
	}
	provider, err := op.NewProvider(options, s, op.StaticIssuer(c.Issuer))
	if err != nil {
		return nil, err
	}
	callback := op.AuthCallbackURL(provider)
	login := func(w http.ResponseWriter, r *http.Request) {
		id := r.FormValue("id")
		if r.Method == http.MethodPost && s.login(id, r.PostFormValue("username"), r.PostFormValue("password")) {
			http.Redirect(w, r, callback(r.Context(), id), http.StatusSeeOther)
			return
		}
		if r.Method == http.MethodPost {
			w.WriteHeader(http.StatusUnauthorized)
		}
		_ = form.Execute(w, id) // the browser has gone
	}
	mux := http.NewServeMux()
	mux.Handle(loginPath, op.NewIssuerInterceptor(provider.IssuerFromRequest).HandlerFunc(login))
	mux.Handle("/", provider)
	return mux, nil
}

const loginPath = "/login"

var form = template.Must(template.New("").Parse(`<!doctype html>
<title>Log in</title>
<form method="post" action="` + loginPath + `">
<input type="hidden" name="id" value="{{.}}">
<input name="username" autocomplete="username">
<input name="password" type="password" autocomplete="current-password">
<button>Log in</button>
</form>
`))
